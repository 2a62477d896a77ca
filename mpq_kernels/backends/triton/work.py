"""Which program multiplies which part of a weight: tables of integers that kernels read. Plain Python, no triton.

A row band is cut into blocks of S row tiles (64 rows each), a block along K into parts of about the same bytes, each
inside one segment. A part is an *item*: what one program does for one block of tokens.

              |-- segment 0 ----|-- segment 1 --|
    block 0:  | item | item     | item          |     three parts: each writes its sums apart,
    block 1:  | item | item     | item          |     and `reduce` adds them in this order
    block 2:  |-- segment 2 --------------------|     one part: writes y itself

Blocks of tokens are programs too: the more of them, the fewer parts. How a weight is cut depends on nothing but its
layout, the number of programs wanted and how many blocks of tokens share them, so the same product on the same device
gives the same bits whatever runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import FormatError
from ...format.codes import FORMATS, TILE_K, TILE_N, scale_block
from ...format.kinds import ZERO_KINDS
from ...format.layout import DTYPE_BYTES, Segment, SegmentOffsets, WeightLayout, ceil_div

# Columns of a row of the table of items.
(KIND, ROW0, ROW_END, COLUMN0, COLUMN_END, LOCAL, COLUMNS, PLANE0, PLANE1, PLANE2, TILE_STRIDE, TILES_LEFT, SCALES,
 ZEROS, GROUPS, GROUP, PART, PARTS, EXPERT) = range(19)  # fmt: skip
ITEM_INTS = 20
# Columns of a row of the table of blocks that have several parts.
BLOCK_ROW0, BLOCK_ROW_END, BLOCK_PARTS, BLOCK_EXPERT = range(4)
BLOCK_INTS = 4

FAST_STEPS = (64, 32, 16)
KINDS = len(ZERO_KINDS)
MAX_INT = 2**31 - 1
# Sums of parts, at most, where a block of tokens does not need more by itself (`tokens_at_once`). With the choices of
# configs.py they are 13 MB on 132 multiprocessors: 264 programs of 256 rows x 32 tokens, and a half for rounding.
MOST_PARTIAL_BYTES = 64 << 20


@dataclass(frozen=True)
class Work:
    """Tables of one weight. kinds: (bits, storage kind) that appear, as bits of an integer (`kind_of`)."""

    items: tuple[int, ...]
    blocks: tuple[int, ...]
    kinds: int
    step: int  # columns that one step multiplies; 0: groups that need the slow kernel
    parts: int  # most parts of a block

    @property
    def num_items(self) -> int:
        """Rows of `items`."""
        return len(self.items) // ITEM_INTS

    @property
    def num_blocks(self) -> int:
        """Rows of `blocks`."""
        return len(self.blocks) // BLOCK_INTS


def kind_of(segment: Segment) -> int:
    """Number of a segment's (bits, storage kind)."""
    return (segment.bits - 1) * KINDS + ZERO_KINDS.index(segment.zero)


def step_of(segment: Segment) -> int:
    """Columns that may be multiplied before scales change: of FAST_STEPS, or 0."""
    if segment.group_size == segment.cols:
        return FAST_STEPS[0]
    return next((step for step in FAST_STEPS if segment.group_size % step == 0), 0)


def tile_cost(segment: Segment, scale_bytes: int) -> float:
    """Bytes of a supertile with its scales and zeros."""
    zero_bytes = {None: 0, "uint8": 1, "scales": scale_bytes}[segment.kind.stored]
    return 512 * segment.bits + TILE_N * TILE_K * (scale_bytes + zero_bytes) / segment.group_size


def share(programs: int, token_blocks: int, tokens: int, rows: int) -> tuple[int, int]:
    """(programs, most parts) of `plan` for one block of tokens of several: as many programs in all, and sums of parts,
    fp32 [parts, tokens, rows], within MOST_PARTIAL_BYTES. By powers of two, so that there are few tables."""
    each = max(1, programs // _power_of_two(token_blocks))
    return each, max(1, min(each, MOST_PARTIAL_BYTES // (4 * rows * _power_of_two(tokens))))


def _power_of_two(count: int) -> int:
    """The least that is not below a positive count."""
    return 1 << (count - 1).bit_length()


def tokens_at_once(parts: int, rows: int, block_m: int) -> int:
    """Tokens of a launch, whole blocks of them, whose sums of `parts` parts stay within MOST_PARTIAL_BYTES."""
    return max(1, MOST_PARTIAL_BYTES // (4 * rows * parts * block_m)) * block_m


def plan(layout: WeightLayout, supertiles: int, programs: int, experts: int = 1, most: int = MAX_INT) -> Work:
    """Tables for blocks of `supertiles` row tiles, in about `programs` items of the same bytes.

    most: parts of a block, where it has no more segments along K than that. experts: equal blocks of rows of a stacked
    weight. Raises FormatError when a band lies in two of them, or when the weight is too large for the tables' 32 bits.
    """
    rows = layout.out_features // experts
    if layout.out_features % experts:
        raise FormatError(f"out_features={layout.out_features} rows do not share out among {experts} experts")
    scale_bytes = DTYPE_BYTES[layout.scale_dtype]
    offsets = iter(layout.offsets)
    bands = [(band, [next(offsets) for _ in band]) for band in layout.bands()]
    total = sum(ceil_div(s.row_tiles, supertiles) * s.col_tiles * tile_cost(s, scale_bytes) for s in layout.segments)
    share = total / max(programs, 1)
    items: list[int] = []
    blocks: list[int] = []
    parts_of_all = 1
    for band, starts in bands:
        expert = band[0].n0 // rows
        if expert != (band[0].n1 - 1) // rows:
            raise FormatError(f"rows {band[0].n0}..{band[0].n1} of one band lie in two experts of {rows} rows")
        cuts = _cuts(band, scale_bytes, share, most)
        parts = sum(map(len, cuts))
        parts_of_all = max(parts_of_all, parts)
        for first in range(0, band[0].row_tiles, supertiles):
            part = 0
            for segment, start, ranges in zip(band, starts, cuts, strict=True):
                for tiles in ranges:
                    items += _item(segment, start, first, tiles, supertiles, (part, parts, expert))
                    part += 1
            row0 = band[0].n0 + first * TILE_N
            if parts > 1:
                blocks += [row0, min(band[0].n1, row0 + supertiles * TILE_N), parts, expert]
    if max(items) > MAX_INT:
        raise FormatError("the weight is too large for the kernels' tables: pack it as several modules")
    kinds = 0
    for segment in layout.segments:
        kinds |= 1 << kind_of(segment)
    step = min(step_of(s) for s in layout.segments)
    return Work(tuple(items), tuple(blocks), kinds, step, parts_of_all)


def _cuts(band: Sequence[Segment], scale_bytes: int, share: float, most: int) -> list[list[tuple[int, int]]]:
    """Ranges of column tiles for each segment of a row block: of about `share` bytes, or as few as `most` asks for."""
    costs = [s.col_tiles * tile_cost(s, scale_bytes) for s in band]
    counts = [max(1, min(s.col_tiles, round(cost / share))) for s, cost in zip(band, costs, strict=True)]
    while sum(counts) > most and max(counts) > 1:
        # The smallest share grows: one cut less where a part has the fewest bytes.
        i = min((i for i, n in enumerate(counts) if n > 1), key=lambda i: costs[i] / counts[i])
        counts[i] -= 1
    return [_ranges(s.col_tiles, n) for s, n in zip(band, counts, strict=True)]


def _ranges(tiles: int, count: int) -> list[tuple[int, int]]:
    """Ranges of the same length but for one tile."""
    bounds = [i * tiles // count for i in range(count + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


def _item(
    segment: Segment, start: SegmentOffsets, row_tile: int, tiles: tuple[int, int], supertiles: int,
    place: tuple[int, int, int],
) -> list[int]:  # fmt: skip
    """One row of the table. Planes are in units of 128 words, scales and zeros of 64 elements."""
    row = [0] * ITEM_INTS
    first, last = tiles
    row[KIND] = kind_of(segment)
    row[ROW0], row[ROW_END] = segment.n0 + row_tile * TILE_N, segment.n1
    row[COLUMN0] = segment.k0 + first * TILE_K
    row[COLUMN_END] = min(segment.k1, segment.k0 + last * TILE_K)
    row[LOCAL] = first * TILE_K
    row[COLUMNS] = row[COLUMN_END] - row[COLUMN0]
    widths = FORMATS[segment.bits].planes
    for index, (words, width) in enumerate(zip(start.planes, widths, strict=True)):
        row[PLANE0 + index] = words // 128 + (row_tile * segment.col_tiles + first) * width
    row[TILE_STRIDE], row[TILES_LEFT] = segment.col_tiles, min(supertiles, segment.row_tiles - row_tile)
    first_scale = scale_block(row_tile, 0, segment.groups)
    row[SCALES] = start.scales // TILE_N + first_scale
    row[ZEROS] = start.zeros // TILE_N + first_scale
    row[GROUPS], row[GROUP] = segment.groups, segment.group_size
    row[PART], row[PARTS], row[EXPERT] = place
    return row
