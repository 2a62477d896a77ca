"""Parts of a packed weight for several devices: rows and columns cut out of the tensors as they are stored.

    rows      at whole supertiles counted from the start of a row band, or at its end
    columns   at multiples of 64; a group that is cut lives on in both parts, with its scale, as a segment of its own

Nothing is unpacked: codes, scales and zeros are copied supertile by supertile. `cover_rows` and `cover_columns` give
the smallest range around the one wanted that can be cut. `stack_weights` puts weights of the same input one below the
other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ..errors import FormatError
from .codes import FORMATS, TILE_K, TILE_N
from .layout import Segment, WeightLayout, ceil_div
from .weights import PackedWeight


def cover_rows(layout: WeightLayout, n0: int, n1: int) -> tuple[int, int]:
    """The smallest range of rows around n0..n1 that `cut_weight` takes."""
    _check_range("rows", n0, n1, layout.out_features)
    first = next(s for s in layout.segments if n0 < s.n1)
    last = next(s for s in layout.segments if n1 <= s.n1)
    return (
        first.n0 + (n0 - first.n0) // TILE_N * TILE_N,
        min(last.n0 + ceil_div(n1 - last.n0, TILE_N) * TILE_N, last.n1),
    )


def cover_columns(layout: WeightLayout, k0: int, k1: int) -> tuple[int, int]:
    """The smallest range of columns around k0..k1 that `cut_weight` takes: all of them where columns are permuted."""
    _check_range("columns", k0, k1, layout.in_features)
    if layout.permuted:
        return 0, layout.in_features
    start, end = k0 // TILE_K * TILE_K, ceil_div(k1, TILE_K) * TILE_K
    while start > 0 and not _starts_at(layout, start):
        start -= TILE_K
    while end < layout.in_features and not _ends_at(layout, end):
        end += TILE_K
    return start, min(end, layout.in_features)


def cut_weight(
    weight: PackedWeight, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None
) -> PackedWeight:
    """Rows n0..n1 and columns k0..k1 as a weight of its own, copied. None takes all.

    Raises FormatError for ranges that `cover_rows` and `cover_columns` would widen.
    """
    layout = weight.layout
    n0, n1 = rows or (0, layout.out_features)
    k0, k1 = columns or (0, layout.in_features)
    if cover_rows(layout, n0, n1) != (n0, n1):
        raise FormatError(f"rows {n0}..{n1} are no whole supertiles of their row bands")
    if cover_columns(layout, k0, k1) != (k0, k1):
        raise FormatError(f"columns {k0}..{k1} cannot be cut out: permuted, or no multiples of {TILE_K} between groups")
    segments: list[Segment] = []
    words: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    zeros: list[torch.Tensor] = []
    for segment, offsets in zip(layout.segments, layout.offsets, strict=True):
        top, bottom = max(n0, segment.n0), min(n1, segment.n1)
        left, right = max(k0, segment.k0), min(k1, segment.k1)
        if top >= bottom or left >= right:
            continue
        tiles = slice((top - segment.n0) // TILE_N, ceil_div(bottom - segment.n0, TILE_N))
        grid = (segment.row_tiles, segment.groups, TILE_N)
        held_scales = weight.scales.narrow(0, offsets.scales, segment.scale_count).view(grid)
        held_zeros = None
        if weight.zeros is not None and segment.zero_count:
            held_zeros = weight.zeros.narrow(0, offsets.zeros, segment.zero_count).view(grid)
        for start, end, group_size in _pieces(segment, left - segment.k0, right - segment.k0):
            part = replace(
                segment,
                n0=top - n0,
                n1=bottom - n0,
                k0=segment.k0 + start - k0,
                k1=segment.k0 + end - k0,
                group_size=group_size,
            )
            segments.append(part)
            columns_of_tiles = slice(start // TILE_K, ceil_div(end, TILE_K))
            counts = zip(FORMATS[segment.bits].planes, offsets.planes, segment.plane_words(), strict=True)
            for width, first, count in counts:
                plane = weight.qweight.narrow(0, first, count)
                plane = plane.view(segment.row_tiles, segment.col_tiles, 2 * TILE_N * width)
                words.append(plane[tiles, columns_of_tiles].reshape(-1))
            groups = slice(start // segment.group_size, ceil_div(end, segment.group_size))
            scales.append(held_scales[tiles, groups].reshape(-1))
            if held_zeros is not None:
                zeros.append(held_zeros[tiles, groups].reshape(-1))
    return PackedWeight(
        WeightLayout(n1 - n0, k1 - k0, tuple(segments), layout.scale_dtype, layout.permuted),
        torch.cat(words),
        torch.cat(scales),
        torch.cat(zeros) if zeros else None,
        None if weight.perm is None else weight.perm.clone(),
    )


def why_not_stacked(first: PackedWeight, second: PackedWeight) -> str | None:
    """None when both can be one weight, one below the other, else the reason why they cannot."""
    a, b = first.layout, second.layout
    if (a.in_features, a.scale_dtype) != (b.in_features, b.scale_dtype):
        return f"{a.in_features} columns and {a.scale_dtype} scales, {b.in_features} and {b.scale_dtype}"
    if len({a.zero_dtype, b.zero_dtype} - {None}) > 1:
        return f"zeros of {a.zero_dtype} and of {b.zero_dtype}"
    if (first.perm is None) != (second.perm is None):
        return "one has permuted columns"
    if first.perm is not None and second.perm is not None and not torch.equal(first.perm, second.perm):
        return "their columns are permuted differently"
    return None


def stack_weights(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Weights of the same input, one below the other, as one. Raises FormatError when `why_not_stacked` has a reason.

    A single weight comes back as it is; several are copied.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    segments: list[Segment] = []
    row = 0
    for weight in weights:
        reason = why_not_stacked(first, weight)
        if reason is not None:
            raise FormatError(f"these weights cannot be one: {reason}")
        segments += [replace(s, n0=s.n0 + row, n1=s.n1 + row) for s in weight.layout.segments]
        row += weight.layout.out_features
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    layout = first.layout
    return PackedWeight(
        WeightLayout(row, layout.in_features, tuple(segments), layout.scale_dtype, layout.permuted),
        torch.cat([weight.qweight for weight in weights]),
        torch.cat([weight.scales for weight in weights]),
        torch.cat(zeros) if zeros else None,
        first.perm,
    )


def _check_range(what: str, start: int, end: int, limit: int) -> None:
    if not 0 <= start < end <= limit:
        raise FormatError(f"{what} {start}..{end} are not in 0..{limit}")


def _starts_at(layout: WeightLayout, column: int) -> bool:
    """Whether the rest of each group that `column` cuts ends where a segment may begin."""
    for s in layout.segments:
        if s.k0 < column < s.k1:
            end = ceil_div(column - s.k0, s.group_size) * s.group_size
            if end != s.cols and end % TILE_K:
                return False
    return True


def _ends_at(layout: WeightLayout, column: int) -> bool:
    """Whether each group that `column` cuts begins where a segment may begin."""
    return not any(
        s.k0 < column < s.k1 and (column - s.k0) // s.group_size * s.group_size % TILE_K for s in layout.segments
    )


def _pieces(segment: Segment, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, group size) of the segments that columns start..end of a segment become, counted from its first."""
    size = segment.group_size
    first, last = ceil_div(start, size) * size, end // size * size
    if start // size == (end - 1) // size:  # within one group
        yield start, end, end - start
        return
    if start < first:
        yield start, first, first - start
    if first < last:
        yield first, last, size
    if last < end:
        yield last, end, end - last
