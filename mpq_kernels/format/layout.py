"""Where a packed weight's bytes are: segments, the tensors they make up, and their exact sizes. No torch.

A packed weight W [N, K] is cut into *row bands*, and each band into *column segments* of one width each:

            k=0          128                  K
     n=0    +-------------+-------------------+
            |  8 bits     |  3 bits           |   band 0: two segments
     n=256  +-------------+-------------------+
            |  4 bits                         |   band 1: one segment
     n=N    +---------------------------------+

A fused q/k/v weight is three bands; a matrix with outlier columns is one band of several segments. Every segment is
padded on its own to whole supertiles. Column cuts are multiples of 64, so that all bands read the same tiles of x;
row cuts are free. All tensors are one-dimensional and hold the segments in order (by n0, then k0).
Source: docs/format.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from ..errors import FormatError
from .codes import FORMATS, SCALE_DTYPES, SEGMENT_INTS, TILE_K, TILE_N, WORD_BITS
from .kinds import KINDS, ZERO_KINDS, StorageKind, why_not_kind

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "uint8": 1}


def ceil_div(value: int, unit: int) -> int:
    """Smallest integer not below value / unit."""
    return -(-value // unit)


@dataclass(frozen=True, slots=True)
class Segment:
    """A rectangle [n0, n1) x [k0, k1) of one width and storage kind.

    `group_size` codes along K share a scale (and a zero).
    """

    n0: int
    n1: int
    k0: int
    k1: int
    bits: int
    group_size: int
    zero: str  # storage kind: one of kinds.ZERO_KINDS

    def __post_init__(self) -> None:
        where = f"segment rows {self.n0}..{self.n1}, columns {self.k0}..{self.k1}"
        for field in ("n0", "n1", "k0", "k1", "bits", "group_size"):
            value = getattr(self, field)
            if type(value) is not int:
                raise FormatError(f"{where}: {field}={value!r} is not an integer")
        if not 0 <= self.n0 < self.n1 or not 0 <= self.k0 < self.k1:
            raise FormatError(f"{where}: empty or negative; need 0 <= n0 < n1 and 0 <= k0 < k1")
        if self.bits not in FORMATS:
            raise FormatError(f"{where}: bits={self.bits} is not one of {sorted(FORMATS)}")
        if self.k0 % TILE_K:
            raise FormatError(f"{where}: column cuts must be multiples of {TILE_K}; k0={self.k0} is not")
        reason = why_not_kind(self.zero)
        if reason is not None:
            raise FormatError(f"{where}: {reason}")
        check_group_size(self.group_size, self.cols, where)

    @property
    def rows(self) -> int:
        """True rows, without padding."""
        return self.n1 - self.n0

    @property
    def cols(self) -> int:
        """True columns, without padding."""
        return self.k1 - self.k0

    @property
    def row_tiles(self) -> int:
        """Supertiles along N."""
        return ceil_div(self.rows, TILE_N)

    @property
    def col_tiles(self) -> int:
        """Supertiles along K."""
        return ceil_div(self.cols, TILE_K)

    @property
    def groups(self) -> int:
        """Groups along K."""
        return self.cols // self.group_size

    @property
    def words(self) -> int:
        """32-bit words of all planes."""
        return self.row_tiles * self.col_tiles * FORMATS[self.bits].tile_words

    @property
    def kind(self) -> StorageKind:
        """What its codes mean."""
        return KINDS[self.zero]

    @property
    def scale_count(self) -> int:
        """Scales, rows padded to whole supertiles."""
        return self.groups * self.row_tiles * TILE_N

    @property
    def zero_count(self) -> int:
        """Stored zero points: as many as scales, or none."""
        return self.kind.zeros_count(self.scale_count)

    def plane_words(self) -> tuple[int, ...]:
        """Words of each plane, in FORMATS[bits].planes order."""
        tiles = self.row_tiles * self.col_tiles
        return tuple(tiles * TILE_N * TILE_K * width // WORD_BITS for width in FORMATS[self.bits].planes)


def segments_from_ints(ints: Sequence[int]) -> tuple[Segment, ...]:
    """The segments of `WeightLayout.segment_ints`. Raises FormatError for what is no such table."""
    if len(ints) % len(SEGMENT_INTS):
        raise FormatError(f"segments must hold {len(SEGMENT_INTS)} integers each, not {len(ints)} in all")
    out = []
    for start in range(0, len(ints), len(SEGMENT_INTS)):
        n0, n1, k0, k1, bits, group_size, zero = ints[start : start + len(SEGMENT_INTS)]
        if not 0 <= zero < len(ZERO_KINDS):
            raise FormatError(f"segments name an unknown kind of zeros, {zero}")
        out.append(Segment(n0, n1, k0, k1, bits, group_size, ZERO_KINDS[zero]))
    return tuple(out)


def check_group_size(group_size: int, cols: int, where: str) -> None:
    """Raise FormatError unless `group_size` codes divide `cols` columns."""
    if group_size < 1 or cols % group_size:
        rest = f" (remainder {cols % group_size})" if group_size > 0 else ""
        raise FormatError(
            f"{where}: {cols} columns are not a multiple of group_size={group_size}{rest}: "
            f"choose a divisor of {cols}, or -1 for one group over all of them"
        )


@dataclass(frozen=True, slots=True)
class SegmentOffsets:
    """First element of a segment in each tensor of its weight."""

    planes: tuple[int, ...]  # words into qweight, one per plane
    scales: int
    zeros: int


@dataclass(frozen=True, slots=True)
class SizeBreakdown:
    """What the bytes of packed tensors are spent on, in bits so that every width adds up exactly."""

    codes: int = 0
    scales: int = 0
    zeros: int = 0
    metadata: int = 0  # the permutation of K
    padding: int = 0  # everything that rounding up to supertiles added
    weights: int = 0  # how many true weights these bits describe

    def __add__(self, other: SizeBreakdown) -> SizeBreakdown:
        return SizeBreakdown(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total_bits(self) -> int:
        """All bits as stored."""
        return self.codes + self.scales + self.zeros + self.metadata + self.padding

    @property
    def total_bytes(self) -> int:
        """All bytes as stored; tensors are whole bytes, so this is exact."""
        return self.total_bits // 8

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each true weight."""
        return self.total_bits / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class WeightLayout:
    """Everything about a packed weight that is not tensor data: shape, segments, dtypes."""

    out_features: int
    in_features: int
    segments: tuple[Segment, ...]
    scale_dtype: str = "float16"
    permuted: bool = False

    def __post_init__(self) -> None:
        if self.scale_dtype not in SCALE_DTYPES:
            raise FormatError(f"scale_dtype={self.scale_dtype!r} is not one of {SCALE_DTYPES}")
        if not self.segments:
            raise FormatError(f"a weight of {self.out_features} x {self.in_features} needs at least one segment")
        if len({s.kind.stored for s in self.segments} - {None}) > 1:
            raise FormatError("one weight cannot mix integer and float zeros: its zeros are one tensor of one dtype")
        row = 0
        for (n0, n1), band in groupby(self.segments, key=lambda s: (s.n0, s.n1)):
            if n0 != row:
                raise FormatError(
                    f"rows {min(n0, row)}..{max(n0, row)} are {'missing' if n0 > row else 'covered twice'}: segments "
                    f"must be sorted by n0, then k0, and the segments of one row band must share n0 and n1"
                )
            self._check_band(n0, n1, tuple(band))
            row = n1
        if row != self.out_features:
            raise FormatError(f"segments cover {row} of {self.out_features} rows")

    def _check_band(self, n0: int, n1: int, band: tuple[Segment, ...]) -> None:
        column = 0
        for segment in band:
            if segment.k0 != column:
                raise FormatError(
                    f"rows {n0}..{n1}: columns {min(column, segment.k0)}..{max(column, segment.k0)} are "
                    f"{'missing' if segment.k0 > column else 'covered twice'}"
                )
            column = segment.k1
        if column != self.in_features:
            raise FormatError(f"rows {n0}..{n1}: segments cover {column} of {self.in_features} columns")

    @classmethod
    def uniform(
        cls,
        out_features: int,
        in_features: int,
        bits: int,
        group_size: int = -1,
        zero: str = "int",
        scale_dtype: str = "float16",
        permuted: bool = False,
    ) -> WeightLayout:
        """One segment over the whole weight. `group_size` -1 means all of K."""
        if out_features < 1 or in_features < 1:
            raise FormatError(f"a weight needs at least one row and one column, not {out_features} x {in_features}")
        size = in_features if group_size == -1 else group_size
        segment = Segment(0, out_features, 0, in_features, bits, size, zero)
        return cls(out_features, in_features, (segment,), scale_dtype, permuted)

    @property
    def zero_dtype(self) -> str | None:
        """Dtype of the zeros tensor, None when there is none."""
        dtypes = (s.kind.zeros_dtype(self.scale_dtype) for s in self.segments)
        return next((dtype for dtype in dtypes if dtype is not None), None)

    def bands(self) -> list[tuple[Segment, ...]]:
        """Segments grouped by row band, in order."""
        return [tuple(band) for _, band in groupby(self.segments, key=lambda s: (s.n0, s.n1))]

    @cached_property
    def offsets(self) -> tuple[SegmentOffsets, ...]:
        """Where each segment starts in qweight, scales and zeros."""
        out, word, scale, zero = [], 0, 0, 0
        for segment in self.segments:
            planes = []
            for count in segment.plane_words():
                planes.append(word)
                word += count
            out.append(SegmentOffsets(tuple(planes), scale, zero))
            scale += segment.scale_count
            zero += segment.zero_count
        return tuple(out)

    def tensor_specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype name, shape) of every tensor that this weight stores."""
        return dict(self._tensor_specs)

    @cached_property
    def _tensor_specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:  # asked for at every call of a Triton kernel
        specs: dict[str, tuple[str, tuple[int, ...]]] = {
            "qweight": ("int32", (sum(s.words for s in self.segments),)),
            "scales": (self.scale_dtype, (sum(s.scale_count for s in self.segments),)),
        }
        if self.zero_dtype is not None:
            specs["zeros"] = (self.zero_dtype, (sum(s.zero_count for s in self.segments),))
        if self.permuted:
            specs["perm"] = ("int32", (self.in_features,))
        return specs

    def rows(self, n0: int, n1: int) -> tuple[WeightLayout, dict[str, tuple[int, int]]]:
        """Layout of rows n0..n1 alone, and (start, length) of their part of qweight, scales and zeros.

        Raises FormatError unless both are cuts between row bands: then the parts are contiguous.
        """
        picked = [i for i, s in enumerate(self.segments) if n0 <= s.n0 and s.n1 <= n1]
        if not picked:
            raise FormatError(f"rows {n0}..{n1} hold no whole row band of this weight")
        chosen = [self.segments[i] for i in picked]
        segments = tuple(replace(s, n0=s.n0 - n0, n1=s.n1 - n0) for s in chosen)
        start = self.offsets[picked[0]]
        parts = {
            "qweight": (start.planes[0], sum(s.words for s in chosen)),
            "scales": (start.scales, sum(s.scale_count for s in chosen)),
            "zeros": (start.zeros, sum(s.zero_count for s in chosen)),
        }
        return WeightLayout(n1 - n0, self.in_features, segments, self.scale_dtype, self.permuted), parts

    def size(self) -> SizeBreakdown:
        """Stored bits by purpose; their sum is the byte size of the tensors, times 8."""
        total = SizeBreakdown()
        scale_bits = 8 * DTYPE_BYTES[self.scale_dtype]
        for s in self.segments:
            zero_bits = 8 * DTYPE_BYTES[s.kind.zeros_dtype(self.scale_dtype) or "uint8"]
            count, true_scales = s.rows * s.cols, s.rows * s.groups
            used = SizeBreakdown(
                codes=count * s.bits,
                scales=true_scales * scale_bits,
                zeros=s.kind.zeros_count(true_scales) * zero_bits,
                weights=count,
            )
            stored = s.words * WORD_BITS + s.scale_count * scale_bits + s.zero_count * zero_bits
            total += replace(used, padding=stored - used.total_bits)
        return total + SizeBreakdown(metadata=32 * self.in_features if self.permuted else 0)

    def segment_ints(self) -> list[int]:
        """The table that operators take: the fields of each segment in order, the zero kind as its index."""
        return [part for *place, zero in self._rows() for part in (*place, ZERO_KINDS.index(zero))]

    def _rows(self) -> list[list[Any]]:
        """The fields of every segment."""
        return [[getattr(s, f.name) for f in fields(s)] for s in self.segments]

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as it stands in config.json."""
        return {
            "out_features": self.out_features,
            "in_features": self.in_features,
            "scale_dtype": self.scale_dtype,
            "permuted": self.permuted,
            "segments": self._rows(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WeightLayout:
        """Inverse of to_dict for data that may come from a hostile file. Raises FormatError."""
        if not isinstance(data, Mapping):
            raise FormatError(f"a layout must be an object, not {type(data).__name__}")
        known = {f.name for f in fields(cls)}
        if set(data) != known:
            raise FormatError(f"a layout has the keys {sorted(known)}, not {sorted(map(str, data))}")
        for key in ("out_features", "in_features"):
            if type(data[key]) is not int or data[key] < 1:
                raise FormatError(f"{key}={data[key]!r} is not a positive integer")
        if type(data["permuted"]) is not bool:
            raise FormatError(f"permuted={data['permuted']!r} is not true or false")
        rows = data["segments"]
        if not isinstance(rows, list) or not all(isinstance(r, list) and len(r) == len(SEGMENT_INTS) for r in rows):
            raise FormatError(f"segments must be a list of [{', '.join(f.name for f in fields(Segment))}]")
        return cls(
            data["out_features"],
            data["in_features"],
            tuple(Segment(*row) for row in rows),
            data["scale_dtype"],
            data["permuted"],
        )


@dataclass(frozen=True, slots=True)
class Member:
    """Rows [n0, n1) of a fused weight are those of the module `name`, a sibling of the fused one."""

    name: str
    n0: int
    n1: int


@dataclass(frozen=True, slots=True)
class Experts:
    """A packed weight holds `count` experts above each other; `module` is the one of the model that it belongs to."""

    module: str
    count: int


@dataclass(frozen=True, slots=True)
class Embedding:
    """A packed weight whose rows are looked up by number. shared: other modules of the model that use it, such as a
    tied head: linears that multiply by it, and embeddings.
    """

    shared: tuple[str, ...] = ()


def check_experts(layout: WeightLayout, experts: int) -> None:
    """Raise FormatError unless the rows are shared out equally among the experts and no band belongs to two."""
    if experts < 1 or layout.out_features % experts:
        raise FormatError(f"{layout.out_features} rows do not share out among {experts} experts")
    rows = layout.out_features // experts
    for s in layout.segments:
        if s.n0 // rows != (s.n1 - 1) // rows:
            raise FormatError(f"rows {s.n0}..{s.n1} lie in two experts of {rows} rows each; cut them between experts")
