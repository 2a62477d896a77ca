"""Which program multiplies which part of a weight: tables of integers that kernels read. Plain Python, no triton.

A row band is cut into blocks of S row tiles (64 rows each), a block along K into parts of about the same bytes, each
inside one segment. A part is an *item*: what one program does for one block of tokens.

              |-- segment 0 ----|-- segment 1 --|
    block 0:  | item | item     | item          |     three parts: each writes its sums apart,
    block 1:  | item | item     | item          |     and `reduce` adds them in this order
    block 2:  |-- segment 2 --------------------|     one part: writes y itself

The cut depends on nothing but the layout and the number of programs wanted, so the same weight on the same device gives
the same bits whatever runs beside it.
"""

from __future__ import annotations

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


def plan(layout: WeightLayout, supertiles: int, programs: int, experts: int = 1) -> Work:
    """Tables for blocks of `supertiles` row tiles, in about `programs` items of the same bytes.

    experts: equal blocks of rows of a stacked weight. Raises FormatError when a band lies in two of them, or when the
    weight is too large for the tables' 32 bits.
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
    most = 1
    for band, starts in bands:
        expert = band[0].n0 // rows
        if expert != (band[0].n1 - 1) // rows:
            raise FormatError(f"rows {band[0].n0}..{band[0].n1} of one band lie in two experts of {rows} rows")
        cuts = [_cut(s, scale_bytes, share) for s in band]
        parts = sum(map(len, cuts))
        most = max(most, parts)
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
    return Work(tuple(items), tuple(blocks), kinds, step, most)


def _cut(segment: Segment, scale_bytes: int, share: float) -> list[tuple[int, int]]:
    """Ranges of column tiles, each of about `share` bytes and all of the same length but the last ones."""
    tiles = segment.col_tiles
    count = min(tiles, max(1, round(tiles * tile_cost(segment, scale_bytes) / share)))
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
