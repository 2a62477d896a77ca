"""Tiny checkpoints that are stored quantized, as DeepSeek-V3 (fp8 in blocks) and gpt-oss (MXFP4) are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.made.checkpoints import tiny_model

KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "bias")  # what such checkpoints leave in 16 bits


def fp8_checkpoint(path: Path, family: str = "deepseek_v3", block: tuple[int, int] = (16, 16), **words: Any) -> Path:
    """A bf16 model whose linears are replaced by fp8 codes and a scale for each block of a weight."""
    tiny_model(family, path, dtype=torch.bfloat16, **words)
    tensors, out = load_file(path / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or any(part in name for part in KEPT):
            out[name] = tensor
            continue
        out[name], out[f"{name}_scale_inv"] = to_fp8(tensor, block)
    rewrite(path, out, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)})
    return path


def to_fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] and scales of ragged blocks."""
    rows, cols = (-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    scales = torch.empty(rows, cols)
    for i in range(rows):
        for j in range(cols):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = part.float().abs().max() / 448
    wide = scales.repeat_interleave(block[0], 0)[: weight.shape[0]]
    wide = wide.repeat_interleave(block[1], 1)[:, : weight.shape[1]]
    return (weight.float() / wide).to(torch.float8_e4m3fn), scales


def mxfp4_checkpoint(path: Path, **words: Any) -> Path:
    """A bf16 gpt-oss whose experts are replaced by random MXFP4 blocks and scales near 2^-3."""
    tiny_model("gpt_oss", path, dtype=torch.bfloat16, **words)
    tensors, out = load_file(path / "model.safetensors"), {}
    rng = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if tensor.dim() != 3:
            out[name] = tensor
            continue
        experts, cols, rows = tensor.shape
        shape = (experts, rows, cols // 32)
        out[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=rng)
        out[f"{name}_scales"] = torch.randint(118, 126, shape, dtype=torch.uint8, generator=rng)
    rewrite(path, out, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    return path


def rewrite(path: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    """Other tensors, and what config.json says of them."""
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
