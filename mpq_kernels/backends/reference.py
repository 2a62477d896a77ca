"""Dequantize with torch, then torch's matmul: any device, no compiled kernel, slow. Never chosen unless asked for.

It builds the whole weight in fp32 at every call, so it reads and writes several times the bytes of a 16-bit model.
"""

from __future__ import annotations

import torch

from .. import reference
from ..formats import ZERO_KINDS
from ..layout import Segment, WeightLayout
from ..weights import DTYPE_NAMES, PackedWeight
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


BACKEND = Backend(
    name="reference",
    summary="dequantize and matmul in torch: any device, slow",
    devices=(),
    linear=_linear,
    dequantize=_dequantize,
    available=lambda: None,
    only_on_request=True,
)
