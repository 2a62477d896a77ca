"""Code layouts: the only place that says how integer codes become 32-bit words.

Codes are cut into supertiles of 64 rows (N) x 64 columns (K). A code of `bits` bits is split, most significant bits
first, into planes of width 4, 2 and 1, so that a supertile takes exactly 512 * bits bytes:

    bits    1    2    3     4    5     6     7       8
    planes  1    2    2,1   4    4,1   4,2   4,2,1   4,4

Inside a supertile an element has the coordinates of the operand-A fragment of `mma.m16n8k16`:

    row    n = 16 t + 8 h + g          t: m16 tile 0..3   h: row half 0..1   g: 0..7
    column k = 16 c + 8 m + 2 q + e    c: k16 chunk 0..3  m: 0..1            q: 0..3   e: 0..1
    lane     = 4 g + q

and a plane of width p holds it in the 32-bit word and at the bit that `word_index` and `bit_index` return:

    p=4: word (c, lane, t)            bits 16 e + 8 m + 4 h
    p=2: word (c>>1, lane, c&1, t>>1) bits 16 e + 8 m + 4 (t&1) + 2 h
    p=1: word (lane, c)               bits 16 e + 8 m + 4 (t&1) + 2 (t>>1) + h

Scales and zeros of a segment are blocks of 64, one for each row tile and group, in the order [row tile][group][64]:
what one row tile needs is one piece. A block keeps the rows of a supertile in the order that one lane reads: row n
sits at 8 g + 4 h + t.

Why this order: docs/format.md, "Why this layout". Standard library only: setup.py loads this file and kinds.py to write
csrc/generated/layout.h, and the compiled parts report LAYOUT_ID back.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from .kinds import KINDS

FORMAT_VERSION = 2
TILE_N = 64
TILE_K = 64
TILE_CODES = TILE_N * TILE_K
WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class BitFormat:
    """How codes of one width are stored."""

    bits: int
    planes: tuple[int, ...]  # plane widths, most significant bits first, from wide to narrow; they add up to `bits`

    @property
    def tile_words(self) -> int:
        """32-bit words of one supertile, all planes."""
        return TILE_CODES * self.bits // WORD_BITS

    @property
    def max_code(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1


FORMATS: dict[int, BitFormat] = {
    f.bits: f
    for f in (
        BitFormat(1, (1,)),
        BitFormat(2, (2,)),
        BitFormat(3, (2, 1)),
        BitFormat(4, (4,)),
        BitFormat(5, (4, 1)),
        BitFormat(6, (4, 2)),
        BitFormat(7, (4, 2, 1)),
        BitFormat(8, (4, 4)),
    )
}
KEPT_BITS = 16  # a plan's word for "leave this weight as it is"
PLANE_WIDTHS = (4, 2, 1)

# Scales (and zeros of their dtype) may have these dtypes; the position is the number that kernels receive.
SCALE_DTYPES = ("float32", "float16", "bfloat16")

# The integers that operators take for each segment, in this order; the kind is its position in kinds.ZERO_KINDS.
SEGMENT_INTS = ("n0", "n1", "k0", "k1", "bits", "group_size", "zero")


def plane_shifts(bits: int) -> tuple[int, ...]:
    """Right shift that brings each plane's field of a code down to bit 0: 7 -> (3, 1, 0)."""
    left, shifts = bits, []
    for width in FORMATS[bits].planes:
        left -= width
        shifts.append(left)
    return tuple(shifts)


def word_index(width: int, n: int, k: int) -> int:
    """Word inside a plane's supertile (0 .. 128 * width - 1) that holds row n, column k (both 0..63)."""
    t, g = n >> 4, n & 7
    c, q = k >> 4, (k >> 1) & 3
    lane = 4 * g + q
    if width == 4:
        return (c * 32 + lane) * 4 + t
    if width == 2:
        return ((c >> 1) * 32 + lane) * 4 + (c & 1) * 2 + (t >> 1)
    return lane * 4 + c


def bit_index(width: int, n: int, k: int) -> int:
    """Lowest bit of the field of row n, column k inside its word."""
    t, h = n >> 4, (n >> 3) & 1
    m, e = (k >> 3) & 1, k & 1
    if width == 4:
        return 16 * e + 8 * m + 4 * h
    if width == 2:
        return 16 * e + 8 * m + 4 * (t & 1) + 2 * h
    return 16 * e + 8 * m + 4 * (t & 1) + 2 * (t >> 1) + h


def row_position(n: int) -> int:
    """Place of row n (0..63) of a supertile in the scales and zeros of its block of 64 rows."""
    t, h, g = n >> 4, (n >> 3) & 1, n & 7
    return 8 * g + 4 * h + t


def scale_block(row_tile: Any, group: Any, groups: int) -> Any:
    """Number (or tensor of numbers) of the block of 64 scales of a row tile and group; `groups`: of the segment."""
    return row_tile * groups + group


def _layout_id() -> str:
    """Digest of every rule above and of kinds.py: two builds with the same id read and write the same bytes."""
    digest = hashlib.sha256()
    digest.update(repr((FORMAT_VERSION, TILE_N, TILE_K, SCALE_DTYPES)).encode())
    digest.update(repr([(f.bits, f.planes) for f in FORMATS.values()]).encode())
    for kind in KINDS.values():
        fixed = [kind.fixed(bits) for bits in FORMATS] if kind.fixed else None
        digest.update(repr((kind.name, kind.stored, kind.says, fixed)).encode())
    digest.update(repr([scale_block(tile, group, 3) for tile in range(3) for group in range(3)]).encode())
    for n in range(TILE_N):
        digest.update(bytes([row_position(n)]))
        for k in range(TILE_K):
            for width in PLANE_WIDTHS:
                digest.update(word_index(width, n, k).to_bytes(2, "little"))
                digest.update(bytes([bit_index(width, n, k)]))
    return f"mpq{FORMAT_VERSION}-{digest.hexdigest()[:16]}"


LAYOUT_ID = _layout_id()
