"""Dequantize with torch, then torch's matmul: any device, no compiled kernel, slow. Never chosen unless asked for.

It builds the whole weight in fp32 at every call, so it reads and writes several times the bytes of a 16-bit model.
"""

from __future__ import annotations

import torch

from ..errors import FormatError
from ..format import reference
from ..format.weights import PackedWeight
from . import ops  # noqa: F401  (registers the operators)
from .base import Backend
from .operands import on_weight


@on_weight(torch.ops.mpq.dequantize.default)
def _dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    return reference.dequantize(weight, dtype)


@on_weight(torch.ops.mpq.linear.default)
def _linear(weight: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    dense = reference.dequantize(weight, torch.float32)
    y = torch.nn.functional.linear(x.float(), dense, None if bias is None else bias.float())
    return y.to(x.dtype)


@on_weight(torch.ops.mpq.grouped_linear.default)
def _grouped(weight: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor) -> torch.Tensor:
    rows, starts = weight.layout.out_features, offsets.tolist()
    experts = len(starts) - 1
    if experts < 1 or rows % experts:
        raise FormatError(f"out_features={rows} rows do not share out among {experts} experts")
    if starts[0] != 0 or starts[-1] != len(x) or starts != sorted(starts):
        raise FormatError(f"offsets {starts} must begin with 0, not decrease, and end with the rows of x, {len(x)}")
    dense = reference.dequantize(weight, torch.float32).view(experts, -1, weight.layout.in_features)
    biases = [None] * experts if bias is None else list(bias.float().view(experts, -1))
    spans = zip(starts, starts[1:], dense, biases, strict=False)
    parts = [torch.nn.functional.linear(x[a:b].float(), w, c) for a, b, w, c in spans]
    return torch.cat(parts).to(x.dtype)


@on_weight(torch.ops.mpq.embedding.default)
def _embedding(weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows = reference.dequantize(weight, dtype).index_select(0, ids.reshape(-1))
    return rows.view(*ids.shape, weight.layout.in_features)


BACKEND = Backend(
    name="reference",
    summary="dequantize and matmul in torch: any device, slow",
    devices=(),
    linear=_linear,
    grouped=_grouped,
    dequantize=_dequantize,
    embedding=_embedding,
    why_unavailable=lambda: None,
    only_on_request=True,
)
