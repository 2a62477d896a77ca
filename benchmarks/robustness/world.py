"""What is mutated: tiny random models, dense and packed, made once for a campaign."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.dense.linears import LinearSpec
from mpq_kernels.packer.pack import pack
from mpq_kernels.plan.plan import Plan

SIZES: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
# model_type -> what its config needs besides SIZES
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {},
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 64},
    "gemma3_text": {"head_dim": 32, "sliding_window": 32},
    "gpt2": {"n_positions": 128},
    "phi3": {},
    "deepseek_v3": LATENT,
    "gpt_oss": EXPERTS | {"head_dim": 16, "sliding_window": 32},
    "mamba": {"state_size": 8},
}
PLAN: dict[str, Any] = {
    "version": 1,
    "model": "made",
    "default": {"bits": 3, "group_size": 32},
    "modules": {
        r"re:.*layers\.0\.mlp\.down_proj": {"bits": 5, "group_size": -1},
        r"re:.*\.(up|v)_proj": {"bits": 4, "group_size": 32, "symmetric": True},
        "model.layers.1.mlp.down_proj": {
            "bits": 2,
            "group_size": 32,
            "perm": list(range(127, -1, -1)),
            "scale_dtype": "float32",
            "segments": [{"cols": [0, 64], "bits": 8}, {"cols": [64, None], "bits": 2, "group_size": 64}],
        },
        "model.layers.1.self_attn.o_proj": {"bits": 16},
        "lm_head": {"bits": 6, "group_size": 32, "zero": "float", "scale_dtype": "bfloat16"},
    },
    "fuse": [{"name": "qk_proj", "members": ["q_proj", "k_proj"]}],
}


def make_model(folder: Path, family: str = "llama", **sizes: Any) -> Path:
    """A dense directory of random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    path = folder / family
    if not path.exists():
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family] | sizes))
            AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def make_packed(folder: Path, family: str = "llama", shard_bytes: int = 10**9) -> Path:
    """A packed directory: PLAN for a Llama, 4 bits for the others."""
    model, out = make_model(folder, family), folder / f"{family}-packed-{shard_bytes}"
    if not out.exists():
        rules = PLAN if family == "llama" else {"version": 1, "default": {"bits": 4, "group_size": -1}}
        pack(model, out, Plan.from_dict(rules), "rtn", max_shard_bytes=shard_bytes, allow_dense=True)
    return out


@cache
def linears(family: str = "llama") -> tuple[LinearSpec, ...]:
    """The linears of a model, from real files."""
    with TemporaryDirectory() as folder:
        return tuple(DenseCheckpoint.open(make_model(Path(folder), family)).linears())


def read_json(path: Path) -> Any:
    """The value in a file of ours."""
    return json.loads(path.read_text())
