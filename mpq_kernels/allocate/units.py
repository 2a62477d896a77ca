"""What an allocator decides about: units of a model, the choices that each may take, and their exact stored bytes.

    granularity   one unit is                                               cells
    layer         all linears of one numbered layer                         whole linears
    linear        one linear                                                one whole linear
    fuse          q, k and v of one parent, or gate and up; else a linear   whole linears
    expert        all linears of one expert; else a linear                  whole linears
    column        `span` columns of one linear                              one rectangle
    row           `span` rows of one linear                                 one rectangle

All cells of a unit get the same choice. Bytes are those of `layout.WeightLayout`, which is what the packer writes:
codes, scales, zeros and the padding to whole supertiles; no nominal width is ever multiplied by a number of weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ..dense.linears import LinearSpec
from ..errors import PlanError
from ..format.codes import FORMATS, KEPT_BITS, TILE_K, TILE_N
from ..format.kinds import ZERO_KINDS
from ..format.layout import WeightLayout

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # siblings that read the same input
NUMBER = re.compile(r"(.*?\.\d+)\..*")  # "model.layers.3" of "model.layers.3.mlp.up_proj"


@dataclass(frozen=True, order=True, slots=True)
class Choice:
    """One way to store a weight. bits 1..8, or 16: kept. group_size -1: all columns. zero: one of ZERO_KINDS."""

    bits: int
    group_size: int = 64
    zero: str = "int"

    def __post_init__(self) -> None:
        if self.bits not in FORMATS and self.bits != KEPT_BITS:
            raise PlanError(f"a choice of bits={self.bits!r} is neither 1..8 nor {KEPT_BITS} (kept)")
        if self.zero not in ZERO_KINDS:
            raise PlanError(f"a choice of zero={self.zero!r} is not one of {ZERO_KINDS}")

    @property
    def kept(self) -> bool:
        """Whether the weight stays as it is."""
        return self.bits == KEPT_BITS

    @property
    def text(self) -> str:
        """ "3g64", or "kept"."""
        return "kept" if self.kept else f"{self.bits}g{'K' if self.group_size == -1 else self.group_size}"


def make_choices(bits: Sequence[int], group_sizes: Sequence[int] = (64,), zero: str = "int") -> tuple[Choice, ...]:
    """Every width with every group size. One bit is symmetric always: with a zero point it has 0 and one other value.

    Raises PlanError for a width that does not exist and for an empty list.
    """
    if not bits or not group_sizes:
        raise PlanError("an allocation needs at least one width and one group size to choose from")
    found: dict[Choice, None] = {}
    for width in sorted(set(bits)):
        if width == KEPT_BITS:
            found[Choice(KEPT_BITS, -1, "none")] = None
            continue
        for size in dict.fromkeys(group_sizes):
            found[Choice(width, size, "none" if width == 1 else zero)] = None
    return tuple(found)


@dataclass(frozen=True)
class Cell:
    """Rows [n0, n1) and columns [k0, k1) of one linear."""

    spec: LinearSpec
    n0: int
    n1: int
    k0: int
    k1: int

    @classmethod
    def whole(cls, spec: LinearSpec) -> Cell:
        """All of a linear."""
        return cls(spec, 0, spec.out_features, 0, spec.in_features)

    @property
    def rows(self) -> int:
        """Rows."""
        return self.n1 - self.n0

    @property
    def cols(self) -> int:
        """Columns."""
        return self.k1 - self.k0

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its linear."""
        return (self.rows, self.cols) == (self.spec.out_features, self.spec.in_features)

    def allows(self, choice: Choice) -> bool:
        """Whether the choice can be stored for this cell: its groups divide the columns, and only whole linears that
        are no experts can be kept (the experts of a module are packed together).
        """
        if choice.kept:
            return self.is_whole and self.spec.expert is None
        return choice.group_size == -1 or self.cols % choice.group_size == 0

    def block_bytes(self, choice: Choice, itemsize: int) -> list[int]:
        """Stored bytes of each 64 rows of the cell, top to bottom, the last with its padding."""
        full, rest = divmod(self.rows, TILE_N)
        blocks = [stored_bytes(TILE_N, self.cols, choice, itemsize)] * full
        return blocks + [stored_bytes(rest, self.cols, choice, itemsize)] if rest else blocks


@lru_cache(maxsize=65536)
def stored_bytes(rows: int, cols: int, choice: Choice, itemsize: int) -> int:
    """Bytes of a rectangle, packed as one segment with fp16 scales, or kept at `itemsize` bytes a weight."""
    if choice.kept:
        return rows * cols * itemsize
    return WeightLayout.uniform(rows, cols, choice.bits, choice.group_size, choice.zero).size().total_bytes


@dataclass(frozen=True)
class Unit:
    """Cells that get one choice out of `choices`. itemsize: bytes of a kept weight."""

    name: str
    cells: tuple[Cell, ...]
    choices: tuple[Choice, ...]
    itemsize: int = 2

    @cached_property
    def weights(self) -> int:
        """How many weights it has."""
        return sum(cell.rows * cell.cols for cell in self.cells)

    @cached_property
    def bytes(self) -> tuple[int, ...]:
        """Stored bytes under each choice."""
        sizes = []
        for choice in self.choices:
            sizes.append(sum(stored_bytes(c.rows, c.cols, choice, self.itemsize) for c in self.cells))
        return tuple(sizes)


@dataclass(frozen=True)
class Limits:
    """Widths that modules must not leave: regexes of whole names -> least or largest bits. The last match wins."""

    least: Mapping[str, int] | None = None
    most: Mapping[str, int] | None = None

    def of(self, name: str) -> tuple[int, int]:
        """(least, largest) bits of a linear."""
        found = []
        for rules, default in ((self.least, 1), (self.most, KEPT_BITS)):
            values = [bits for pattern, bits in (rules or {}).items() if re.fullmatch(pattern, name)]
            found.append(values[-1] if values else default)
        return found[0], found[1]

    def check(self, linears: Sequence[LinearSpec]) -> None:
        """Raise PlanError for a pattern that is none or that names no linear."""
        for pattern in (*(self.least or ()), *(self.most or ())):
            try:
                used = any(re.fullmatch(pattern, spec.name) for spec in linears)
            except re.error as error:
                raise PlanError(f"limit {pattern!r} is not a regular expression: {error}") from error
            if not used:
                raise PlanError(f"limit {pattern!r} matches none of the {len(linears)} linears that are allocated")


def make_units(
    linears: Sequence[LinearSpec],
    granularity: str,
    choices: Sequence[Choice],
    *,
    span: int = 128,
    limits: Limits | None = None,
    itemsize: int = 2,
) -> tuple[Unit, ...]:
    """Units over all linears but the output head, routers and towers.

    span: columns or rows of a unit, a multiple of 64. Raises PlanError: an unknown granularity, a bad span, a unit that
    is left without any choice.
    """
    if granularity not in GRANULARITIES:
        raise PlanError(f"granularity={granularity!r} is not one of {', '.join(GRANULARITIES)}")
    if span < TILE_K or span % TILE_K:
        raise PlanError(f"span={span} must be a positive multiple of {TILE_K}, the side of a supertile")
    specs = allocated(linears)
    limits = limits or Limits()
    limits.check(specs)
    units = []
    for name, cells in GRANULARITIES[granularity](specs, span):
        bounds = [limits.of(cell.spec.name) for cell in cells]
        low, high = max(b[0] for b in bounds), min(b[1] for b in bounds)
        fit = tuple(c for c in choices if low <= c.bits <= high and all(cell.allows(c) for cell in cells))
        if not fit:
            cols = sorted({cell.cols for cell in cells})
            raise PlanError(
                f"{name}: none of {', '.join(c.text for c in choices)} fits {low}..{high} bits and columns {cols}: "
                "give more widths, or a group size that divides the columns, such as -1 (all of them)"
            )
        units.append(Unit(name, tuple(cells), fit, itemsize))
    return tuple(units)


def allocated(linears: Sequence[LinearSpec]) -> list[LinearSpec]:
    """The linears that are allocated: no output head, routers, towers and projectors. PlanError when none is left."""
    specs = [spec for spec in linears if not (spec.is_head or spec.router or spec.tower)]
    if not specs:
        raise PlanError("the model has no linear besides its head, routers and towers, so there is nothing to allocate")
    return specs


Named = Iterator[tuple[str, list[Cell]]]


def _grouped(specs: Sequence[LinearSpec], name_of: Callable[[LinearSpec], str]) -> Named:
    groups: dict[str, list[Cell]] = {}
    for spec in specs:
        groups.setdefault(name_of(spec), []).append(Cell.whole(spec))
    yield from groups.items()


def _layer(spec: LinearSpec) -> str:
    match = NUMBER.fullmatch(spec.name)
    return match[1] if match else spec.name


def _expert(spec: LinearSpec) -> str:
    return spec.name if spec.expert is None else f"{spec.expert.block}.{spec.expert.index}"


def _fuse(spec: LinearSpec) -> str:
    parent, _, child = spec.name.rpartition(".")
    group = next((group for group in FUSED if child in group), None)
    return spec.name if group is None else f"{parent}.({'|'.join(group)})"


def _columns(specs: Sequence[LinearSpec], span: int) -> Named:
    for spec in specs:
        for k0 in range(0, spec.in_features, span):
            k1 = min(k0 + span, spec.in_features)
            yield f"{spec.name}[:, {k0}:{k1}]", [Cell(spec, 0, spec.out_features, k0, k1)]


def _rows(specs: Sequence[LinearSpec], span: int) -> Named:
    for spec in specs:
        for n0 in range(0, spec.out_features, span):
            n1 = min(n0 + span, spec.out_features)
            yield f"{spec.name}[{n0}:{n1}]", [Cell(spec, n0, n1, 0, spec.in_features)]


GRANULARITIES: dict[str, Callable[[Sequence[LinearSpec], int], Named]] = {
    "layer": lambda specs, span: _grouped(specs, _layer),
    "linear": lambda specs, span: _grouped(specs, lambda spec: spec.name),
    "fuse": lambda specs, span: _grouped(specs, _fuse),
    "expert": lambda specs, span: _grouped(specs, _expert),
    "column": _columns,
    "row": _rows,
}
