"""Random packed weights, made packed from the start: for timing, where values do not matter but bytes do."""

from __future__ import annotations

import math

import torch

from .codes import FORMATS
from .kinds import KINDS
from .layout import Segment, WeightLayout
from .weights import TORCH_DTYPES, PackedWeight

LEAST_SCALE = 2.0**-14  # the smallest normal fp16 number


def random_weight(layout: WeightLayout, device: torch.device | str, generator: torch.Generator) -> PackedWeight:
    """A packed weight of random codes, directly in packed form; its values have mean 0 and about variance 1 / K."""
    tensors: dict[str, torch.Tensor] = {}
    for name, (dtype, shape) in layout.tensor_specs().items():
        tensors[name] = torch.empty(shape, dtype=TORCH_DTYPES[dtype], device=device)
    tensors["qweight"].random_(-(2**31), 2**31, generator=generator)
    for segment, offset in zip(layout.segments, layout.offsets, strict=True):
        scales = tensors["scales"].narrow(0, offset.scales, segment.scale_count)
        scales.uniform_(0.75, 1.25, generator=generator).mul_(_middle_scale(segment, layout.in_features))
        if segment.zero_count:
            _fill_zeros(segment, tensors["zeros"].narrow(0, offset.zeros, segment.zero_count), scales, generator)
    if layout.permuted:
        order = torch.randperm(layout.in_features, device=device, generator=generator)
        tensors["perm"].copy_(order)
    return PackedWeight(layout, tensors["qweight"], tensors["scales"], tensors.get("zeros"), tensors.get("perm"))


def _middle_scale(segment: Segment, in_features: int) -> float:
    """Scale that gives uniform codes the deviation 1 / sqrt(K), above what fp16 would store with fewer digits."""
    variance = (4**segment.bits - 1) / 12 + (0.25 if segment.kind.stored == "uint8" else 0)  # see _fill_zeros
    deviation = math.sqrt(variance)
    return max(1 / math.sqrt(in_features) / deviation, LEAST_SCALE / 0.75)


def _fill_zeros(segment: Segment, zeros: torch.Tensor, scales: torch.Tensor, generator: torch.Generator) -> None:
    """What makes the middle of the codes 0: where it is an integer, one of its two neighbours at random."""
    half = KINDS["half"].zero(segment.bits, None)
    if segment.kind.stored == "uint8":
        upper = (FORMATS[segment.bits].max_code + 1) // 2
        zeros.random_(upper - 1, upper + 1, generator=generator)
    elif segment.zero == "min":
        zeros.copy_(scales).mul_(-half)
    else:
        zeros.fill_(half)
