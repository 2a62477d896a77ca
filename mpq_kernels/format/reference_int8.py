"""The oracle of int8 activations: how x is rounded, what the product then is, and how far it may be from the exact one.

Within each group of a weight, the columns are cut in blocks of at most 128. For each token and block, in fp32,

    amax = max |x|    inverse = 127 / amax    scale = amax / 127    codes = round(x * inverse)     ties to even
    y[n] = sum over blocks of scale_w * scale * (sum code_w * code - zero * sum code)
           kind `min`:        scale_w * scale * sum code_w * code + zero * scale * sum code

The two inner sums are integers and exact. A block whose amax is below 2**-100 counts as zero; one with NaN or Inf has
the scale NaN. With a permutation, blocks are cut in the packed order of the columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from .layout import Segment
from .reference import dequantize, magnitudes
from .weights import PackedWeight, QuantizedWeight
from .words import unpack_weight

BLOCK_COLUMNS = 128  # csrc/cpu/int8/blocks.h
LEAST_AMAX = 2.0**-100  # csrc/cpu/int8/round_x.inl


def blocks_of(segment: Segment) -> Iterator[tuple[int, int]]:
    """Columns [begin, end) of the packed weight that share a scale of x, one block after the other."""
    for group in range(segment.k0, segment.k1, segment.group_size):
        end = group + segment.group_size
        for begin in range(group, end, BLOCK_COLUMNS):
            yield begin, min(begin + BLOCK_COLUMNS, end)


def round_block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int32 of the shape of x, scale fp32 [..., 1]) of the columns of one block, x fp32 [..., columns]."""
    amax = x.abs().amax(-1, keepdim=True)
    finite = torch.isfinite(x).all(-1, keepdim=True)
    used = finite & (amax >= LEAST_AMAX)
    most = torch.full_like(amax, 127.0)  # a tensor: torch divides a number by a tensor in two roundings
    inverse = torch.where(used, most / amax, 0.0)
    codes = (torch.where(used, x, 0.0) * inverse).round().to(torch.int32)
    scale = torch.where(used, amax / most, torch.where(finite, 0.0, float("nan")))
    return codes, scale


def rounded(x: torch.Tensor, segment: Segment, perm: torch.Tensor | None = None) -> torch.Tensor:
    """codes * scale in fp64, (..., columns of the segment), in packed order: the x that one segment multiplies."""
    packed = x.float() if perm is None else x.float()[..., perm.long()]
    parts = []
    for begin, end in blocks_of(segment):
        codes, scale = round_block(packed[..., begin:end])
        parts.append(codes.double() * scale.double())
    return torch.cat(parts, -1)


def linear_int8(
    x: torch.Tensor, weight: QuantizedWeight | PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y (..., N) in fp64 for x (..., K): the rounded x times the exact weight."""
    quantized = unpack_weight(weight) if isinstance(weight, PackedWeight) else weight
    dense = _packed_order(dequantize(quantized, torch.float64), quantized.perm)
    y = x.new_zeros(*x.shape[:-1], quantized.layout.out_features, dtype=torch.float64)
    for s in quantized.layout.segments:
        y[..., s.n0 : s.n1] += rounded(x, s, quantized.perm) @ dense[s.n0 : s.n1, s.k0 : s.k1].T
    return y if bias is None else y + bias.double()


def accumulation_bound(
    x: torch.Tensor, weight: QuantizedWeight | PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Largest |y - linear_int8(x)| of a kernel: fp32 roundings of blocks, and one of y to x.dtype. fp64 (..., N).

    As reference.error_bound, but only a block's result is rounded, never a product: by the zero, the product with it,
    the product of the scales and that with the sums, then one addition for each block, and the bias.
    """
    quantized = unpack_weight(weight) if isinstance(weight, PackedWeight) else weight
    layout = quantized.layout
    size = _packed_order(magnitudes(quantized), quantized.perm)
    terms = x.new_zeros(*x.shape[:-1], layout.out_features, dtype=torch.float64)
    for s in layout.segments:
        terms[..., s.n0 : s.n1] += rounded(x, s, quantized.perm).abs() @ size[s.n0 : s.n1, s.k0 : s.k1].T
    if bias is not None:
        terms = terms + bias.double().abs()
    added = Counter(s.n0 for s in layout.segments for _ in blocks_of(s))  # blocks of each row band
    roundings = (max(added.values()) + 8) * 2.0**-24
    accumulated = terms * roundings / (1 - roundings)
    y = linear_int8(x, quantized, bias)
    info = torch.finfo(x.dtype)
    return accumulated + (y.abs() + accumulated) * info.eps / 2 + info.smallest_normal * info.eps / 2


def error_bound(
    x: torch.Tensor, weight: QuantizedWeight | PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Largest |y - linear(x)| of a kernel with int8 activations, fp64 (..., N): what rounding x costs, and fp32.

    Rounding moves an element of a block by at most half a step, amax / 254, and 127 * 2**-22 of a step more because
    the inverse, the product with it and the scale are rounded themselves. Columns of a block below 2**-100 become 0.
    """
    quantized = unpack_weight(weight) if isinstance(weight, PackedWeight) else weight
    dense = _packed_order(dequantize(quantized, torch.float64), quantized.perm).abs()
    packed = x.double() if quantized.perm is None else x.double()[..., quantized.perm.long()]
    moved = x.new_zeros(*x.shape[:-1], quantized.layout.out_features, dtype=torch.float64)
    for s in quantized.layout.segments:
        for begin, end in blocks_of(s):
            amax = packed[..., begin:end].abs().amax(-1, keepdim=True)
            step = amax / 127 * (0.5 + 127 * 2.0**-22)
            step = torch.where(amax < LEAST_AMAX, amax, step)
            moved[..., s.n0 : s.n1] += step * dense[s.n0 : s.n1, begin:end].sum(1)
    return moved + accumulation_bound(x, quantized, bias)


def _packed_order(dense: torch.Tensor, perm: torch.Tensor | None) -> torch.Tensor:
    """Columns [N, K] in the order in which they are packed."""
    return dense if perm is None else dense[:, perm.long()]
