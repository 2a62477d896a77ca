"""Rows of a packed weight by number, in torch: for devices whose backend has no kernel for it. Reads only their words.

id -> row tile, row n of it -> for each plane and column: word and bit (codes.py) -> weight (kinds.py)
"""

from __future__ import annotations

import functools

import torch

from .codes import FORMATS, TILE_K, TILE_N, row_position, scale_block
from .layout import Segment, SegmentOffsets
from .weights import PackedWeight
from .words import code_tables


def lookup(weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows (..., K) of `reference.dequantize(weight, dtype)` for integer ids (...), bit for bit.

    An id outside of 0..N - 1 raises RuntimeError; on other devices than the CPU it stops the device, as in torch.
    """
    layout = weight.layout
    flat = ids.reshape(-1).long()
    inside = (flat >= 0) & (flat < layout.out_features)
    torch._assert_async(inside.all(), f"index out of range: the embedding has rows 0..{layout.out_features - 1}")
    out = torch.zeros(len(flat), layout.in_features, dtype=torch.float32, device=weight.qweight.device)
    for segment, start in zip(layout.segments, layout.offsets, strict=True):
        here = ((flat >= segment.n0) & (flat < segment.n1))[:, None]
        rows = (flat - segment.n0).clamp(0, segment.rows - 1)
        columns = out[:, segment.k0 : segment.k1]
        columns.copy_(torch.where(here, _values(weight, segment, start, rows), columns))
    if weight.perm is not None:
        original = torch.empty_like(out)
        original[:, weight.perm.long()] = out
        out = original
    return out.to(dtype).view(*ids.shape, layout.in_features)


def _values(weight: PackedWeight, segment: Segment, start: SegmentOffsets, rows: torch.Tensor) -> torch.Tensor:
    """fp32 [rows, columns of the segment] for rows counted from its first."""
    row_tile, n = rows // TILE_N, rows % TILE_N
    tiles = (row_tile * segment.col_tiles)[:, None] + torch.arange(segment.col_tiles, device=rows.device)
    codes = torch.zeros(len(rows), segment.col_tiles, TILE_K, dtype=torch.int32, device=rows.device)
    for width, first in zip(FORMATS[segment.bits].planes, start.planes, strict=True):
        word, bit = (table.view(TILE_N, TILE_K)[n][:, None] for table in code_tables(width, rows.device))
        words = weight.qweight[first + tiles[:, :, None] * 128 * width + word]
        codes = (codes << width) | ((words >> bit.int()) & ((1 << width) - 1))
    blocks = scale_block(row_tile[:, None], torch.arange(segment.groups, device=rows.device), segment.groups)
    place = blocks * TILE_N + _positions(rows.device)[n][:, None]
    values = codes.flatten(1)[:, : segment.cols].float().view(len(rows), segment.groups, segment.group_size)
    stored = None
    if weight.zeros is not None and segment.zero_count:
        stored = weight.zeros[start.zeros + place].float()[:, :, None]
    scale, zero = weight.scales[start.scales + place].float()[:, :, None], segment.kind.zero(segment.bits, stored)
    return (segment.kind.decode(values, scale, zero) + 0.0).view(len(rows), segment.cols)


@functools.cache
def _positions(device: torch.device) -> torch.Tensor:
    """Place of each row of a supertile in its block of scales, int64 [64]."""
    return torch.tensor([row_position(n) for n in range(TILE_N)], device=device)
