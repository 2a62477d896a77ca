"""Dequantize with torch, then torch's matmul: any device, no compiled kernel, slow. Never chosen unless asked for.

It builds the whole weight in fp32 at every call, so it reads and writes several times the bytes of a 16-bit model.
"""

from __future__ import annotations

import torch

from ..errors import FormatError
from ..format import reference
from ..format.codes import ZERO_KINDS
from ..format.layout import Segment, WeightLayout
from ..format.weights import DTYPE_NAMES, PackedWeight
from .base import Backend


def _dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    segments: list[int],
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    table = []
    for i in range(0, len(segments), 7):
        n0, n1, k0, k1, bits, group_size, zero = segments[i : i + 7]
        table.append(Segment(n0, n1, k0, k1, bits, group_size, ZERO_KINDS[zero]))
    layout = WeightLayout(out_features, in_features, tuple(table), DTYPE_NAMES[scales.dtype], perm is not None)
    return reference.dequantize(PackedWeight(layout, qweight, scales, zeros, perm), dtype)


def _linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    segments: list[int],
    out_features: int,
    in_features: int,
) -> torch.Tensor:
    weight = _dequantize(qweight, scales, zeros, perm, segments, out_features, in_features, torch.float32)
    y = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return y.to(x.dtype)


def _grouped(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    segments: list[int],
    out_features: int,
    in_features: int,
) -> torch.Tensor:
    starts = offsets.tolist()
    experts = len(starts) - 1
    if experts < 1 or out_features % experts:
        raise FormatError(f"out_features={out_features} rows do not share out among {experts} experts")
    if starts[0] != 0 or starts[-1] != len(x) or starts != sorted(starts):
        raise FormatError(f"offsets {starts} must begin with 0, not decrease, and end with the rows of x, {len(x)}")
    weight = _dequantize(qweight, scales, zeros, perm, segments, out_features, in_features, torch.float32)
    weights = weight.view(experts, -1, in_features)
    biases = [None] * experts if bias is None else list(bias.float().view(experts, -1))
    spans = zip(starts, starts[1:], weights, biases, strict=False)
    parts = [torch.nn.functional.linear(x[a:b].float(), w, c) for a, b, w, c in spans]
    return torch.cat(parts).to(x.dtype)


BACKEND = Backend(
    name="reference",
    summary="dequantize and matmul in torch: any device, slow",
    devices=(),
    linear=_linear,
    grouped=_grouped,
    dequantize=_dequantize,
    available=lambda: None,
    only_on_request=True,
)
