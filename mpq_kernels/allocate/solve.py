"""From units, their losses and a budget to a plan whose bytes were counted by the packer's own rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..dense.linears import LinearSpec
from ..errors import PlanError
from ..format.codes import KEPT_BITS, TILE_N
from ..plan.plan import FusePlan, Plan, SegmentPlan, WeightPlan
from ..plan.resolve import resolve
from .budget import Budget
from .exact import solve_exact
from .fast import relaxed, solve_fast
from .fill import Filled, Split, fill, rectangles
from .knapsack import AtLeast, Knapsack
from .latency import LatencyTable
from .latency import costs as latency_costs
from .units import Cell, Choice, Unit, allocated

SOLVERS: dict[str, Callable[[Knapsack], tuple[int, ...]]] = {"fast": solve_fast, "exact": solve_exact}
Losses = Sequence[Sequence[float]]  # for every unit, for each of its choices


@dataclass(frozen=True)
class Allocation:
    """A plan and what it comes to. bytes: stored, allocated linears only, recounted from the plan's layouts.

    weights: of those linears. loss: by the method's own count. us: by the latency table, None without one.
    picks: index of the choice of each unit; splits: units of which some rows have another.
    """

    plan: Plan
    bytes: int
    weights: int
    loss: float
    us: float | None
    picks: tuple[int, ...]
    splits: dict[int, Split]

    @property
    def bpw(self) -> float:
        """Stored bits for each weight."""
        return 8 * self.bytes / self.weights


def allocate(
    linears: Sequence[LinearSpec],
    units: Sequence[Unit],
    losses: Losses,
    budget: Budget,
    *,
    solver: str = "fast",
    latency: LatencyTable | None = None,
    at_least: Sequence[AtLeast] = (),
    model: str | None = None,
) -> Allocation:
    """The plan of least total loss within a budget.

    linears: all of the model, in its order; units: from make_units over them. A budget in bytes or bits is met to less
    than one block of 64 rows of any unit, and never exceeded. Raises PlanError: a budget that cannot be met, losses
    that do not fit the units, a latency that was not measured; UnsupportedError: what a solver cannot do.
    """
    if solver not in SOLVERS:
        raise PlanError(f"solver={solver!r} is not one of {', '.join(SOLVERS)}")
    weights = sum(unit.weights for unit in units)
    limit = budget.limit(weights)
    sizes: list[list[float]] = [[float(b) for b in unit.bytes] for unit in units]
    if budget.kind == "us" and latency is None:
        raise PlanError("a budget in microseconds needs a latency table measured on the device")
    table = latency_costs(units, latency) if latency is not None else None
    if budget.kind == "error":
        # The dual: bytes are what is to be small, losses what is limited. The same knapsack with the two exchanged.
        picks = SOLVERS[solver](Knapsack.of(losses, sizes, limit, at_least))
        problem = Knapsack.of(sizes, losses, sum(max(s) for s in sizes))
        found = _whole(units, problem, picks)
    elif budget.kind == "us" and table is not None:
        problem = Knapsack.of(table, losses, limit, at_least)
        found = _whole(units, problem, SOLVERS[solver](problem))
    else:
        problem = Knapsack.of(sizes, losses, limit, at_least)
        found = fill(units, problem, SOLVERS[solver](problem))
        if not at_least:
            found = min(found, fill(units, problem, relaxed(problem, skip=False)), key=lambda f: f.loss)
    plan = make_plan(linears, units, found.picks, found.splits, model)
    counted = plan_bytes(plan, linears, units[0].itemsize)
    if counted != found.bytes or (budget.kind in ("bits", "bytes") and counted > limit):
        raise PlanError(f"the plan takes {counted:,} bytes, and {found.bytes:,} of {limit:,.0f} were allocated to it")
    us = None if table is None else float(sum(row[p] for row, p in zip(table, found.picks, strict=True)))
    return Allocation(plan, counted, weights, found.loss, us, found.picks, found.splits)


def _whole(units: Sequence[Unit], problem: Knapsack, picks: tuple[int, ...]) -> Filled:
    size = sum(unit.bytes[pick] for unit, pick in zip(units, picks, strict=True))
    return Filled(picks, {}, size, problem.loss_of(picks))


def make_plan(
    linears: Sequence[LinearSpec],
    units: Sequence[Unit],
    picks: Sequence[int],
    splits: Mapping[int, Split] | None = None,
    model: str | None = None,
    fuse: Sequence[FusePlan] = (),
) -> Plan:
    """The plan that gives every unit its pick. What no unit covers is kept, but for heads tied to such an embedding."""
    parts: dict[str, list[tuple[Cell, Choice]]] = {}
    for index, (unit, pick) in enumerate(zip(units, picks, strict=True)):
        for cell, choice in rectangles(unit, pick, (splits or {}).get(index)):
            parts.setdefault(cell.spec.name, []).append((cell, choice))
    modules = {name: _rule(found) for name, found in parts.items()}
    left = {spec.name for spec in linears} - parts.keys()
    left -= {name for spec in linears if spec.embedding and spec.name in parts for name in spec.shared}
    modules |= {spec.name: WeightPlan(bits=KEPT_BITS) for spec in linears if spec.name in left}
    return Plan(model=model, modules=modules, fuse=tuple(fuse))


def plan_bytes(plan: Plan, linears: Sequence[LinearSpec], itemsize: int) -> int:
    """Stored bytes of the linears that are allocated: packed as the plan says, kept ones at `itemsize` a weight."""
    resolved = resolve(plan, linears)
    kept = sum(s.out_features * s.in_features * itemsize for s in allocated(linears) if s.name in resolved.kept)
    return resolved.size().total_bytes + kept


def _rule(parts: Sequence[tuple[Cell, Choice]]) -> WeightPlan:
    """The rule of one linear from its rectangles; neighbours of one choice become one."""
    merged = _merge(parts)
    cell, first = merged[0]
    if first.kept:
        return WeightPlan(bits=KEPT_BITS)
    zero = next((c.zero for _, c in merged if c.zero != "none"), "int")
    if len(merged) == 1 and first.zero == "none":
        return WeightPlan(bits=first.bits, group_size=first.group_size, symmetric=True)
    if len(merged) == 1:
        return WeightPlan(bits=first.bits, group_size=first.group_size, zero=zero)
    segments = []
    for cell, choice in merged:
        rows = (cell.n0, None if cell.n1 == cell.spec.out_features else cell.n1)
        cols = (cell.k0, None if cell.k1 == cell.spec.in_features else cell.k1)
        own = None if choice.zero == zero else choice.zero
        segments.append(SegmentPlan(rows=rows, cols=cols, bits=choice.bits, group_size=choice.group_size, zero=own))
    return WeightPlan(bits=first.bits, group_size=first.group_size, segments=tuple(segments), zero=zero)


def _merge(parts: Sequence[tuple[Cell, Choice]]) -> list[tuple[Cell, Choice]]:
    """Rectangles by row, then column; two of one choice become one where that changes no group and no tile."""
    out: list[tuple[Cell, Choice]] = []
    for cell, choice in sorted(parts, key=lambda p: (p[0].n0, p[0].k0)):
        if out and out[-1][1] == choice:
            last = out[-1][0]
            below = (last.k0, last.k1) == (cell.k0, cell.k1) and last.n1 == cell.n0 and last.rows % TILE_N == 0
            beside = (last.n0, last.n1) == (cell.n0, cell.n1) and last.k1 == cell.k0 and choice.group_size != -1
            if below or beside:
                out[-1] = (Cell(cell.spec, last.n0, cell.n1, last.k0, cell.k1), choice)
                continue
        out.append((cell, choice))
    return out
