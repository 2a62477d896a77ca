"""The multiple-choice knapsack: one choice for each unit, least total loss, total cost within a budget.

    min  sum_u loss[u, x_u]   subject to   sum_u cost[u, x_u] <= budget   and, optionally,
                                           at least `count` of some units take one of some choices

Costs may be bytes or microseconds and need not grow with the width: a measured latency table is welcome as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import PlanError

Floats = np.ndarray


@dataclass(frozen=True)
class AtLeast:
    """At least `count` of `units` (indexes) take one of their `choices`: {unit: set of choice indexes}."""

    choices: dict[int, frozenset[int]]
    count: int
    name: str = "constraint"


@dataclass(frozen=True)
class Knapsack:
    """costs, losses: an array for each unit, an entry for each of its choices. Losses must be finite."""

    costs: tuple[Floats, ...]
    losses: tuple[Floats, ...]
    budget: float
    at_least: tuple[AtLeast, ...] = field(default=())

    @classmethod
    def of(
        cls,
        costs: Sequence[Sequence[float]],
        losses: Sequence[Sequence[float]],
        budget: float,
        at_least: Sequence[AtLeast] = (),
    ) -> Knapsack:
        """Check and convert. Raises PlanError: lengths that differ, NaN or Inf, a budget below the least cost."""
        if not costs or len(costs) != len(losses):
            raise PlanError(f"{len(costs)} units have costs and {len(losses)} have losses; need as many, at least one")
        pairs = []
        for index, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
            pair = np.asarray(cost, dtype=np.float64), np.asarray(loss, dtype=np.float64)
            if pair[0].ndim != 1 or not len(pair[0]) or pair[0].shape != pair[1].shape:
                raise PlanError(f"unit {index}: costs {pair[0].shape} and losses {pair[1].shape} do not pair up")
            if not all(np.isfinite(values).all() for values in pair):
                raise PlanError(f"unit {index}: a cost or loss is NaN or Inf, so choices cannot be compared")
            pairs.append(pair)
        least = float(sum(cost.min() for cost, _ in pairs))
        if not budget >= least:
            raise PlanError(
                f"the budget of {budget:,.6g} is below {least:,.6g}, the cost of the cheapest choice for every unit: "
                "allow narrower widths or larger groups, or raise the budget"
            )
        return cls(tuple(c for c, _ in pairs), tuple(x for _, x in pairs), float(budget), tuple(at_least))

    def cost_of(self, picks: Sequence[int]) -> float:
        """Total cost of a choice for each unit."""
        return float(sum(cost[pick] for cost, pick in zip(self.costs, picks, strict=True)))

    def loss_of(self, picks: Sequence[int]) -> float:
        """Total loss of a choice for each unit."""
        return float(sum(loss[pick] for loss, pick in zip(self.losses, picks, strict=True)))

    def holds(self, picks: Sequence[int]) -> bool:
        """Whether the picks keep the budget and all constraints."""
        if self.cost_of(picks) > self.budget:
            return False
        return all(sum(picks[u] in set_ for u, set_ in rule.choices.items()) >= rule.count for rule in self.at_least)


def hull(cost: Floats, loss: Floats) -> list[int]:
    """Choices on the lower convex hull of (cost, loss), by rising cost and falling loss; the first is the cheapest."""
    order = np.lexsort((loss, cost))
    kept: list[int] = []
    for index in order.tolist():
        if kept and loss[index] >= loss[kept[-1]]:
            continue
        while len(kept) >= 2:
            a, b = kept[-2], kept[-1]
            left = (loss[a] - loss[b]) * (cost[index] - cost[b])
            right = (loss[b] - loss[index]) * (cost[b] - cost[a])
            if left > right:
                break
            kept.pop()
        kept.append(index)
    return kept
