"""Tiny random Hugging Face checkpoints for tests: real model classes, real files, made in milliseconds.

model = tiny_model("qwen2", tmp_path / "model", tied=False)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

logging.disable_progress_bar()

VOCAB = 160
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEAD = {"head_dim": 32}
# family -> (config class, what it needs besides SIZES). Sizes that are not multiples of 64 are there on purpose.
FAMILIES: dict[str, tuple[type[PreTrainedConfig], Mapping[str, Any]]] = {
    "llama": (LlamaConfig, {"intermediate_size": 172}),
    "qwen2": (Qwen2Config, {}),  # q, k and v have biases, o has none
    "qwen3": (Qwen3Config, HEAD),
    "mistral": (MistralConfig, {}),
    "gemma": (GemmaConfig, HEAD),
    "gemma2": (Gemma2Config, HEAD),
    "gemma3": (Gemma3TextConfig, HEAD | {"hidden_size": 96}),
    "phi": (PhiConfig, {"num_key_value_heads": 4}),  # biases everywhere, a head with a bias
    "phi3": (Phi3Config, {"hidden_size": 128}),  # qkv and gate/up are stored fused
}
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
CHOSEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
# Mixture models, whose experts transformers holds as 3-D parameters.
MIXTURES: dict[str, tuple[type[PreTrainedConfig], Mapping[str, Any]]] = {
    "mixtral": (MixtralConfig, {"num_local_experts": 3, "intermediate_size": 96}),  # stored one by one: w1, w3, w2
    "qwen3_moe": (Qwen3MoeConfig, CHOSEN | {"decoder_sparse_step": 1, "head_dim": 16}),
    "qwen2_moe": (Qwen2MoeConfig, CHOSEN | {"shared_expert_intermediate_size": 64}),
    "gpt_oss": (  # stored merged, transposed, gate and up interleaved, with biases
        GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 32},
    ),
    "deepseek_v2": (DeepseekV2Config, LATENT),
    "deepseek_v3": (DeepseekV3Config, LATENT),
}


def tiny_model(
    family: str,
    path: str | Path,
    *,
    tied: bool | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: int | str = "50GB",
    sizes: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Write a random checkpoint of `family` to `path` and return its model, in eval mode.

    tied: whether the head is the input embedding (None: what the family does). max_shard_size: bytes, or text such as
    "20KB". sizes: overrides for the config, such as {"intermediate_size": 172}. Weights depend only on the arguments.
    """
    config_class, extra = (FAMILIES | MIXTURES)[family]
    values = SIZES | extra | (sizes or {})
    if tied is not None:
        values = values | {"tie_word_embeddings": tied}
    config = config_class(**values)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[config_class](config)
        with torch.no_grad():  # fresh models have norms of one and biases of zero, which would hide mistakes
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or name.endswith("_bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    finally:
        torch.set_rng_state(state)
    model = model.to(dtype).eval()
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model
