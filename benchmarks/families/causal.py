"""The causal families: all that transformers has as a language model, and what some of them need besides shrink.py."""

from __future__ import annotations

from .cases import Case, Changes, Kind, token_ids, without_cache

MAMBA = {"mamba_d_head": 16, "mamba_n_heads": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
DOTS3 = {
    "num_key_value_heads": 4, "head_dim": 32, "index_head_dim": 32, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32, "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 2, "hc_lowrank": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
ONE_EACH = {"layer_types": ["linear_attention", "full_attention"]}
# model type -> changes of its tiny config; `...` leaves a value to the class.
CHANGES: dict[str, Changes] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 200, "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 128, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "dots3_note": {
        "text_config": DOTS3, "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": DOTS3,
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": ["sliding_attention",
                     "full_attention"] * 2, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]},
    "gemma4_assistant": {"default": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}},
    "got_ocr2": {"vision_config": {"image_size": 64}},  # position embeddings in proportion
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**MAMBA, **ONE_EACH},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [4, 8], "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "hash_seed": 1, "num_buckets": 2,
    },
    "xlnet": {"d_inner": 256},  # as much of it in linears as in real ones; attention has 3-D parameters, and stays
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3, "attention_hidden_size": 128,
        "attention_head_dim": 32, "num_key_value_heads": 4, "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": ...,
        "kv_channels": ..., "num_key_value_heads": 4, "mamba_ngroups": 1, "chunk_size": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


INPUTS = {"blt": without_cache}


def cases() -> list[Case]:
    """Every model type of MODEL_FOR_CAUSAL_LM_MAPPING."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [
        Case(
            "causal", model_type, "AutoModelForCausalLM", CHANGES.get(model_type, {}), INPUTS.get(model_type, token_ids)
        )
        for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ]


KIND = Kind("Causal language models", cases)
