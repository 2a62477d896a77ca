"""Codes, scales and zeros of one width and one group size, which is what other formats of integers hold.

segments of one width, of kinds none and int        -> codes [N, K], scales and zeros [N, K / group]
groups of several sizes                             -> of their greatest common divisor, scales repeated
permutation perm, column j is column perm[j] of W   -> g_idx [K], the group of every column of W
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from ..format.weights import TORCH_DTYPES, PackedWeight
from ..format.words import unpack_weight
from .source import Linear, PackedSource

MIN_GROUP = 8
WORD = 32  # bits


@dataclass(frozen=True)
class Shape:
    """What a weight is in such a format. permuted: whether the order of its columns matters."""

    bits: int
    group: int
    symmetric: bool
    permuted: bool
    scales: torch.dtype


@dataclass(frozen=True)
class Wanted:
    """What a target holds. dtypes: of scales. permuted: whether it has a place for an order of the columns."""

    target: str
    bits: Sequence[int]
    dtypes: Sequence[torch.dtype]
    permuted: bool
    rows: int = 1  # N must be a multiple
    cols: int = 1  # K must be a multiple


def shape_of(source: PackedSource, linear: Linear, wanted: Wanted) -> Shape | str:
    """The shape of a linear, or why it has none there."""
    layout = linear.layout
    if linear.embedding:
        return "is an embedding, which has no quantized form there: pack with --embeddings 16"
    if layout is None:
        return "is stored in float8"
    widths = sorted({s.bits for s in layout.segments})
    if len(widths) > 1:
        return (
            f"has {' and '.join(map(str, widths))} bits, and a weight has one width there: plan with "
            "`mpq plan allocate --granularity linear`"
        )
    bits = widths[0]
    if bits not in wanted.bits:
        return f"has {bits} bits, and {wanted.target} holds {', '.join(map(str, wanted.bits))}"
    kinds = {s.zero for s in layout.segments}
    if kinds - {"none", "int"} or (bits == 1 and "none" in kinds):
        other = sorted(kinds - {"none", "int"} or kinds)[0]
        return f"has zeros of the kind {other} at {bits} bits, and zeros are codes there: plan with --zero int"
    dtype = TORCH_DTYPES[layout.scale_dtype]
    if dtype not in wanted.dtypes:
        return f"has scales in {layout.scale_dtype}: plan with --scale-dtype float16"
    group = math.gcd(*(s.group_size for s in layout.segments))
    if group < MIN_GROUP:
        return f"has groups of sizes with no common divisor of {MIN_GROUP} or more"
    permuted = layout.permuted and group < linear.cols
    if permuted and not wanted.permuted:
        return "has reordered columns (act-order), for which there is no place there"
    if linear.rows % wanted.rows or linear.cols % wanted.cols:
        return (
            f"is {linear.rows} x {linear.cols}, and {wanted.target} fills whole words: multiples of {wanted.rows} rows "
            f"and {wanted.cols} columns"
        )
    if "int" in kinds:
        zeros = source.weight(linear).zeros
        assert zeros is not None
        if int(zeros.max()) >= 1 << bits:
            return f"has a zero point of {int(zeros.max())}, which is no code of {bits} bits"
    return Shape(bits, group, kinds == {"none"}, permuted, dtype)


def shapes_of(source: PackedSource, wanted: Wanted) -> dict[str, Shape]:
    """Linear -> its shape. Reads zeros, and no codes. Raises CheckpointError for all that have none."""
    found = {linear.name: shape_of(source, linear, wanted) for linear in source.linears}
    source.has_no([(name, why) for name, why in found.items() if isinstance(why, str)], wanted.target)
    return {name: shape for name, shape in found.items() if isinstance(shape, Shape)}


@dataclass(frozen=True, eq=False)
class Integers:
    """codes, zeros: uint8. codes are in the columns' own order, scales and zeros in that of the groups."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor


def integers(weight: PackedWeight, shape: Shape) -> Integers:
    """Unpack a weight of that shape."""
    quantized, rows, cols = unpack_weight(weight), weight.layout.out_features, weight.layout.in_features
    codes = torch.empty(rows, cols, dtype=torch.uint8)
    scales = torch.empty(rows, cols // shape.group, dtype=shape.scales)
    zeros = torch.full(scales.shape, 1 << (shape.bits - 1), dtype=torch.uint8)
    for n0, k0, block in quantized.blocks:
        n, k = block.codes.shape
        codes[n0 : n0 + n, k0 : k0 + k] = block.codes
        place = (slice(n0, n0 + n), slice(k0 // shape.group, (k0 + k) // shape.group))
        times = block.group_size // shape.group
        scales[place] = block.scales.repeat_interleave(times, dim=1)
        if block.zeros is not None:
            zeros[place] = block.zeros.repeat_interleave(times, dim=1)
    g_idx = (torch.arange(cols) // shape.group).to(torch.int32)
    if quantized.perm is not None:
        order = quantized.perm.long()
        codes = torch.empty_like(codes).index_copy_(1, order, codes)
        g_idx = torch.empty_like(g_idx).index_copy_(0, order, g_idx)
    return Integers(codes, scales, zeros, g_idx)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, count] -> int32 [rows, words]: one code behind the other from the lowest bit on, the rest zeros."""
    rows, count = codes.shape
    blocks = -(-count // WORD)
    padded = torch.zeros(rows, blocks * WORD, dtype=torch.int32)
    padded[:, :count] = codes
    padded = padded.view(rows, blocks, WORD)
    out = torch.zeros(rows, blocks, bits, dtype=torch.int32)
    for index in range(WORD):
        word, shift = divmod(bits * index, WORD)
        out[:, :, word] |= padded[:, :, index] << shift
        if shift + bits > WORD:
            out[:, :, word + 1] |= padded[:, :, index] >> (WORD - shift)
    return out.view(rows, -1)[:, : words_for(count, bits)].contiguous()


def words_for(count: int, bits: int) -> int:
    """Words that `count` codes take."""
    return -(-count * bits // WORD)


def check_values(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Raise CheckpointError where a value that was made is none."""
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name}: a value is too large for {tensor.dtype}: plan with --scale-dtype bfloat16")
    return tensor
