"""A plan in the making: which width a foreign file wants for each linear of the target model, and what had to change.

Readers name linears and widths; `Draft.plan` makes rules of exact names from them and applies the result to the model,
so that what comes out resolves. Nothing is rounded: a width that cannot be had is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...dense.linears import LinearSpec
from ...errors import PlanError
from ...files.strict import close_names, short
from ...format.codes import KEPT_BITS, TILE_K
from ..patterns import Clock
from ..plan import Plan, SegmentPlan, WeightPlan
from ..resolve import resolve

KINDS = ("changed", "reinterpreted", "dropped", "kept")
SHOWN = 3  # modules that a note names


@dataclass(frozen=True)
class Note:
    """What differs from the foreign file. kind: one of KINDS. modules: the linears that it is about, none for all."""

    kind: str
    text: str
    modules: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = ", ..." if len(self.modules) > SHOWN else ""
        names = f" [{len(self.modules)}: {', '.join(self.modules[:SHOWN])}{more}]" if self.modules else ""
        return f"{self.kind}: {self.text}{names}"


@dataclass(frozen=True)
class Wanted:
    """What a file asks of one linear. bits 1..8 or 16; group_size: columns, -1 for all of K.

    columns: widths of the groups of columns one after the other, in place of `bits`.
    """

    bits: int
    group_size: int
    symmetric: bool = False
    columns: tuple[int, ...] | None = None

    @property
    def kept(self) -> bool:
        """Whether the weight stays as it is."""
        return self.bits == KEPT_BITS


@dataclass
class Draft:
    """Wishes by linear, and notes. where: the foreign file. specs: the linears of the target model by name.

    clock: what is left of the time for its regular expressions.
    """

    where: str
    specs: dict[str, LinearSpec]
    wishes: dict[str, Wanted] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def of(cls, where: str, linears: Sequence[LinearSpec]) -> Draft:
        """An empty draft. Raises PlanError when there is nothing to plan for."""
        if not linears:
            raise PlanError("the model has no linear layers, so there is nothing to import a plan for")
        return cls(where, {spec.name: spec for spec in linears})

    def fail(self, place: str, why: str) -> PlanError:
        """The error for a place of the file."""
        return PlanError(f"{self.where}: {place}: {why}")

    def note(self, kind: str, text: str, modules: Iterable[str] = ()) -> None:
        """Tell what is not as in the file."""
        self.notes.append(Note(kind, text, tuple(modules)))

    def spec(self, name: str) -> LinearSpec:
        """The linear of this name. Raises PlanError with close names."""
        if name not in self.specs:
            raise self.fail(short(name), f"the model has no linear of this name{close_names(name, list(self.specs))}")
        return self.specs[name]

    def bits(self, value: Any, place: str) -> int:
        """A width: 1..8, or 16 for "kept". Raises PlanError for any other value."""
        if isinstance(value, bool) or not isinstance(value, int) or not (1 <= value <= 8 or value == KEPT_BITS):
            raise self.fail(
                place, f"bits={short(value)} is neither a whole number 1..8 nor {KEPT_BITS} (kept as it is)"
            )
        return value

    def group(self, value: Any, place: str) -> int:
        """A group size: columns, or -1. Raises PlanError."""
        if isinstance(value, bool) or not isinstance(value, int) or not (value == -1 or value >= 1):
            raise self.fail(place, f"group_size={short(value)} is neither a positive whole number nor -1 (all of K)")
        return value

    def flag(self, value: Any, place: str) -> bool:
        """true or false. Raises PlanError."""
        if not isinstance(value, bool):
            raise self.fail(place, f"{short(value)} is neither true nor false")
        return value

    def want(self, name: str, wanted: Wanted) -> None:
        """Ask for a width of a linear that the model has."""
        self.wishes[self.spec(name).name] = wanted

    def plan(self, kept_experts: int | None) -> Plan:
        """The plan of all wishes, with exact names. kept_experts: bits for experts that are kept beside packed ones.

        Raises PlanError when it does not fit the model.
        """
        self._keep_routers()
        self._keep_unnamed()
        self._agree_experts(kept_experts)
        self._make_one_bit_symmetric()
        rules = {name: self._rule(spec) for name, spec in self.specs.items()}
        ragged = [name for name, rule in rules.items() if self._is_ragged(name, rule)]
        if ragged:
            self.note(
                "reinterpreted", "the last group of columns is shorter than the others: a segment of its own", ragged
            )
        plan = Plan(model=f"imported from {self.where.rpartition('/')[2]}", modules=rules)
        try:
            resolve(plan, list(self.specs.values()))
        except PlanError as error:
            raise PlanError(f"{self.where}: its widths do not fit the model: {error}") from error
        return plan

    def _keep_routers(self) -> None:
        routers = [n for n, spec in self.specs.items() if spec.router and n in self.wishes and not self.wishes[n].kept]
        for name in routers:
            self.wishes[name] = Wanted(KEPT_BITS, -1)
        if routers:
            self.note("changed", f"linears that score or weigh experts are kept in {KEPT_BITS} bits", routers)

    def _keep_unnamed(self) -> None:
        unnamed = [name for name in self.specs if name not in self.wishes]
        for name in unnamed:
            self.wishes[name] = Wanted(KEPT_BITS, -1)
        if unnamed:
            self.note("kept", f"the file gives them no width: {KEPT_BITS} bits", unnamed)

    def _agree_experts(self, kept_experts: int | None) -> None:
        """All experts of a module are packed or all are kept; give single kept ones the width that was asked for."""
        blocks: dict[str, list[str]] = {}
        for name, spec in self.specs.items():
            if spec.expert is not None:
                blocks.setdefault(spec.expert.block, []).append(name)
        raised = []
        for block, names in blocks.items():
            kept = [name for name in names if self.wishes[name].kept]
            packed = [name for name in names if not self.wishes[name].kept]
            if not kept or not packed:
                continue
            if kept_experts is None:
                raise PlanError(
                    f"{self.where}: {kept[0]} is kept in {KEPT_BITS} bits and {packed[0]} is packed ({len(kept)} and "
                    f"{len(packed)} linears of {block}); the experts of one module are packed together: give those "
                    "another width, which kept_experts=8 (--kept-experts 8) does for all of them"
                )
            like = self.wishes[packed[0]]
            for name in kept:
                self.wishes[name] = replace(like, bits=kept_experts, columns=None)
            raised += kept
        if raised:
            self.note("changed", f"experts that were kept beside packed ones get {kept_experts} bits", raised)

    def _make_one_bit_symmetric(self) -> None:
        found = [
            n for n, wanted in self.wishes.items() if wanted.bits == 1 and not wanted.symmetric and not wanted.columns
        ]
        for name in found:
            self.wishes[name] = replace(self.wishes[name], symmetric=True)
        if found:
            self.note("reinterpreted", "one bit is symmetric: -scale/2 and +scale/2, no zero points", found)

    def _rule(self, spec: LinearSpec) -> WeightPlan:
        wanted = self.wishes[spec.name]
        if wanted.kept:
            return WeightPlan(bits=KEPT_BITS)
        k, group = spec.in_features, wanted.group_size
        if wanted.columns is not None:
            return self._columns_rule(spec, wanted, wanted.columns)
        if group >= k or group == -1:
            return WeightPlan(bits=wanted.bits, group_size=-1, symmetric=wanted.symmetric)
        cut = k // group * group
        if cut == k or cut % TILE_K:  # the second is refused by `resolve`, which names divisors
            return WeightPlan(bits=wanted.bits, group_size=group, symmetric=wanted.symmetric)
        segments = (
            SegmentPlan(cols=(0, cut), bits=wanted.bits),
            SegmentPlan(cols=(cut, None), bits=wanted.bits, group_size=-1),
        )
        return WeightPlan(bits=wanted.bits, group_size=group, symmetric=wanted.symmetric, segments=segments)

    def _columns_rule(self, spec: LinearSpec, wanted: Wanted, columns: tuple[int, ...]) -> WeightPlan:
        """One segment for each run of equal widths; a shorter last group is a segment of its own."""
        group, k = wanted.group_size, spec.in_features
        runs: list[list[int]] = []  # [first column, end, bits]
        for index, bits in enumerate(columns):
            start, end = index * group, min((index + 1) * group, k)
            if runs and runs[-1][2] == bits and end - start == group:
                runs[-1][1] = end
            else:
                runs.append([start, end, bits])
        if len(runs) == 1 and (k % group == 0 or k < group):
            return self._rule_of_one(runs[0][2], group if k >= group else -1, wanted.symmetric)
        segments = []
        for start, end, bits in runs:
            size = group if (end - start) % group == 0 else -1
            symmetric = True if bits == 1 and not wanted.symmetric else None
            cols = (start, None if end == k else end)
            segments.append(SegmentPlan(cols=cols, bits=bits, group_size=size, symmetric=symmetric))
        return WeightPlan(bits=max(columns), group_size=group, symmetric=wanted.symmetric, segments=tuple(segments))

    @staticmethod
    def _rule_of_one(bits: int, group: int, symmetric: bool) -> WeightPlan:
        return WeightPlan(bits=bits, group_size=group, symmetric=symmetric or bits == 1)

    def _is_ragged(self, name: str, rule: WeightPlan) -> bool:
        group = self.wishes[name].group_size
        return rule.segments is not None and self.specs[name].in_features % group != 0


def layer_of(name: str) -> tuple[int, str] | None:
    """(number of the layer, the name inside it) of a module of a layer; None for one outside, such as the head."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if place is None else (int(parts[place]), ".".join(parts[place + 1 :]))
