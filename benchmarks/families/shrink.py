"""A config of any family becomes a tiny one: sizes by name, whatever the family, and a few layers of every kind.

    hidden_size 4096 -> 64      num_hidden_layers 32 -> 2      layer_types [a, a, a, b, ...] -> [a, b]

Sizes that only one family has stand in that family's own changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .cases import VOCAB, Changes

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, LAYERS, EXPERTS, CHOSEN, POSITIONS, RANK = 64, 128, 4, 2, 16, 2, 4, 2, 128, 32

# New value -> names of what gets it, where a config has it as a positive number.
SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (VOCAB, (
        "vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "audio_vocab_size",
        "shape_vocab_size", "pronunciation_vocab_size",
    )),
    (HIDDEN, (
        "hidden_size", "d_model", "n_embd", "dim_model", "emb_dim", "embedding_size", "word_embed_proj_dim",
        "input_embedding_size", "output_embedding_size", "attention_hidden_size", "lru_width", "backbone_hidden_size",
        "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
        "shared_experts_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size",
        "shape_embed_dim", "pronunciation_embed_dim", "out_hidden_size", "embedding_dim",
    )),
    (INNER, (
        "intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "n_inner", "dff", "dim_ff", "d_inner",
        "ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size", "feed_forward_size", "mlp_dim",
    )),
    (LAYERS, (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth",
        "num_encoder_layers", "num_decoder_layers", "num_blocks",
    )),
    (HEADS, (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
        "attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads", "index_n_heads",
        "linear_num_heads", "linear_num_value_heads", "swa_num_attention_heads",
    )),
    (KV_HEADS, (
        "num_key_value_heads", "kv_n_heads", "num_kv_heads", "linear_num_key_heads", "swa_num_key_value_heads",
    )),
    (HEAD, (
        "head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "dim_head", "d_head", "linear_head_dim",
        "linear_key_head_dim", "linear_value_head_dim", "swa_head_dim", "query_pre_attn_scalar", "kv_channels",
        "rotary_dim", "attention_head_size", "hidden_size_per_layer_input",
    )),
    (POSITIONS, (
        "max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length", "model_max_length",
        "max_target_positions", "max_source_positions", "original_max_position_embeddings",
    )),
    (EXPERTS, ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")),
    (CHOSEN, ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "n_group",
             "num_expert_group")),
    (1, ("topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts",
        "num_dense_layers", "moe_layer_start_index", "num_nextn_predict_layers")),
    (RANK, ("kv_lora_rank", "q_lora_rank", "o_lora_rank", "laurel_rank", "adapter_rank")),
    (32, ("sliding_window", "sliding_window_size", "window_size", "attention_window_size", "attention_chunk_size",
         "local_attention", "index_head_dim", "qk_head_dim")),
    (8, ("index_topk", "mamba_d_state", "mamba_n_heads", "ssm_state_size", "state_size", "mamba_num_heads",
        "n_mamba_heads", "time_step_rank")),
    (16, ("mamba_d_head", "mamba_head_dim", "mamba_chunk_size", "chunk_size")),
)  # fmt: skip
BY_NAME = {name: size for size, names in SIZES for name in names}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
FIRST_SPECIAL = 110  # of the other special tokens: those of images and the like
LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
MOST_LAYERS = 4
DEFAULT = "default"  # a change of this name: what the class needs to make a default config
DEPTH, KV = "num_hidden_layers", "num_key_value_heads"


def tiny_config(config_class: Any, changes: Changes) -> Any:
    """The tiny config of a class, with a family's own changes."""
    default = dict(changes.get(DEFAULT, {}))
    changes = {name: value for name, value in changes.items() if name != DEFAULT}
    return config_class(**merged(tiny_values(config_class(**default)), changes))


def merged(values: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """Values with changes, which go into dicts; a change of `...` leaves a value to the class."""
    out = dict(values)
    for name, value in changes.items():
        inner = out.get(name)
        if value is ...:
            out.pop(name, None)
        else:
            out[name] = merged(inner, value) if isinstance(value, Mapping) and isinstance(inner, Mapping) else value
    return out


def tiny_values(config: Any) -> dict[str, Any]:
    """What the tiny config differs in from a default one, configs inside it included."""
    named = config.to_dict()
    out: dict[str, Any] = {}
    special = FIRST_SPECIAL
    for name, value in named.items():
        if name in config.sub_configs:
            inner = getattr(config, name)
            if inner is not None:
                out[name] = tiny_values(inner)
        elif name in SPECIAL:
            out[name] = SPECIAL[name] if value is not None else None
        elif name.endswith(("_token_id", "_token_index")) and _number(value) and value >= VOCAB:
            out[name] = special
            special += 1
        elif name in BY_NAME and _number(value) and value > 0:
            out[name] = BY_NAME[name]
    if "kv_lora_rank" in named and KV in out:
        out[KV] = HEADS  # latent attention has keys and values for every head
    return out | _layers(named)


def _layers(named: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of each kind that the default model has."""
    kinds = {name: named[name] for name in LAYER_KINDS if isinstance(named.get(name), list) and named[name]}
    if not kinds or len({len(value) for value in kinds.values()}) != 1:
        return {}
    layers = list(dict.fromkeys(zip(*kinds.values(), strict=True)))[:MOST_LAYERS]
    layers += layers[-1:] * (LAYERS - len(layers))
    out: dict[str, Any] = {name: [layer[i] for layer in layers] for i, name in enumerate(kinds)}
    return out | ({DEPTH: len(layers)} if DEPTH in named else {})


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
