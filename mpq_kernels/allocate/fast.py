"""The knapsack solved nearly exactly, in milliseconds: steepest steps along convex hulls, then exchanges.

1. every unit starts at its cheapest choice, and the steps of all convex hulls are taken by falling loss per cost as
   long as they fit: the optimum of the relaxed problem but for the last step
2. the best move of one unit, or of two at once, that keeps the budget and lowers the loss is made until there is none
3. the units whose next steps are closest to the last one taken are decided anew, all at once: a dynamic program over
   their undominated (cost, loss) pairs, thinned to FRONTIER of them; exact for instances of few units
"""

from __future__ import annotations

import numpy as np

from ..errors import UnsupportedError
from .knapsack import Floats, Knapsack, hull

MAX_EXCHANGES = 10_000
CORE = 14  # units of step 3
FRONTIER = 4000


def solve_fast(problem: Knapsack) -> tuple[int, ...]:
    """A choice for each unit. Raises UnsupportedError for constraints besides the budget, which it cannot keep."""
    if problem.at_least:
        raise UnsupportedError(
            f"the fast solver keeps a budget and nothing else, and {problem.at_least[0].name} is asked for: "
            "choose solver='exact'"
        )
    start = relaxed(problem, skip=True)
    picks = np.array(start)
    costs, losses = _table(problem.costs), _table(problem.losses)
    slack = problem.budget - problem.cost_of(start)
    for _ in range(MAX_EXCHANGES):
        moves = _best_exchange(costs, losses, picks, slack)
        if not moves:
            break
        for unit, choice in moves:
            slack -= costs[unit, choice] - costs[unit, picks[unit]]
            picks[unit] = choice
    found = tuple(int(pick) for pick in picks)
    again = _decide_anew(problem, found, _core(problem, start))
    return again if problem.holds(again) and problem.loss_of(again) < problem.loss_of(found) else found


def relaxed(problem: Knapsack, skip: bool) -> tuple[int, ...]:
    """Hull steps by falling loss per cost until one does not fit. skip: pass over it and go on with smaller ones."""
    steps = _steps(problem)
    picks = [int(np.lexsort((loss, cost))[0]) for cost, loss in zip(problem.costs, problem.losses, strict=True)]
    slack = problem.budget - problem.cost_of(picks)
    closed: set[int] = set()
    for _, unit, choice, cost in steps:
        if unit in closed:
            continue
        if cost <= slack:
            picks[unit] = choice
            slack -= cost
        elif skip:
            closed.add(unit)
        else:
            break
    return tuple(picks)


def _steps(problem: Knapsack) -> list[tuple[float, int, int, float]]:
    """Steps of all hulls by falling loss per cost: (loss per cost, unit, choice, cost)."""
    steps = []
    for unit, (cost, loss) in enumerate(zip(problem.costs, problem.losses, strict=True)):
        kept = hull(cost, loss)
        for a, b in zip(kept, kept[1:], strict=False):
            steps.append(((loss[a] - loss[b]) / (cost[b] - cost[a]), unit, b, cost[b] - cost[a]))
    return sorted(steps, key=lambda step: -step[0])


def _core(problem: Knapsack, picks: tuple[int, ...]) -> list[int]:
    """The units that have a step closest to where the relaxed solution stopped."""
    steps = _steps(problem)
    taken = [gain for gain, unit, choice, _ in steps if problem.costs[unit][picks[unit]] >= problem.costs[unit][choice]]
    last = np.log(min(taken, default=steps[0][0] if steps else 1.0))
    near: dict[int, None] = {}
    for _, unit, _, _ in sorted(steps, key=lambda step: abs(np.log(step[0]) - last)):
        near[unit] = None
    return list(near)[:CORE]


def _decide_anew(problem: Knapsack, picks: tuple[int, ...], core: list[int]) -> tuple[int, ...]:
    """The picks with those of the core units replaced by the best of all their combinations that fit."""
    outside = sum(problem.costs[u][p] for u, p in enumerate(picks) if u not in core)
    room = problem.budget - outside
    least = [float(problem.costs[unit].min()) for unit in core]
    cost, loss, chosen = np.zeros(1), np.zeros(1), np.zeros((1, 0), dtype=np.int64)
    for place, unit in enumerate(core):
        count = len(problem.costs[unit])
        total = (cost[:, None] + problem.costs[unit]).ravel()
        worth = (loss[:, None] + problem.losses[unit]).ravel()
        before = np.repeat(np.arange(len(cost)), count)
        fits = np.nonzero(total <= room - sum(least[place + 1 :]))[0]
        order = fits[np.lexsort((worth[fits], total[fits]))]
        if not len(order):
            return picks  # rounding of sums: what fits exactly once may not fit when it is added in another order
        lowest = np.minimum.accumulate(worth[order])
        order = order[np.concatenate([[True], lowest[1:] < lowest[:-1]])]  # undominated ones
        if len(order) > FRONTIER:
            bins = ((total[order] - total[order[0]]) * (FRONTIER / max(np.ptp(total[order]), 1e-300))).astype(np.int64)
            order = order[np.concatenate([bins[1:] != bins[:-1], [True]])]  # the dearest of a bin loses least
        chosen = np.concatenate([chosen[before[order]], (order % count)[:, None]], axis=1)
        cost, loss = total[order], worth[order]
    out = list(picks)
    for unit, pick in zip(core, chosen[-1].tolist(), strict=True):
        out[unit] = pick
    return tuple(out)


def _table(values: tuple[Floats, ...]) -> Floats:
    """[units, most choices], Inf where a unit has fewer."""
    out = np.full((len(values), max(len(v) for v in values)), np.inf)
    for row, entries in zip(out, values, strict=True):
        row[: len(entries)] = entries
    return out


def _best_exchange(costs: Floats, losses: Floats, picks: Floats, slack: float) -> list[tuple[int, int]]:
    """The one or two moves (unit, choice) that lower the loss most within `slack`; none when nothing does.

    Moves are sorted by cost; for each, the best partner is the move of least loss change among those cheap enough, of
    another unit: the running best and the running best of any other unit suffice.
    """
    units = np.arange(len(picks))
    extra = costs - costs[units, picks][:, None]
    change = losses - losses[units, picks][:, None]
    unit, choice = np.nonzero(np.isfinite(extra) & (np.arange(costs.shape[1]) != picks[:, None]))
    if not len(unit):
        return []
    cost, gain = extra[unit, choice], change[unit, choice]
    order = np.argsort(cost, kind="stable")
    unit, choice, cost, gain = unit[order], choice[order], cost[order], gain[order]
    first, second = _running_best(gain, unit)
    fits = np.searchsorted(cost, slack - cost, side="right") - 1  # last partner that fits
    best, moves = -1e-12 * float(np.abs(losses[units, picks]).sum()), []
    alone = np.where(cost <= slack, gain, np.inf)
    at = int(alone.argmin())
    if alone[at] < best:
        best, moves = float(alone[at]), [at]
    partner = np.where(fits >= 0, first[fits], -1)
    same = (partner >= 0) & (unit[partner] == unit)
    partner = np.where(same, second[fits], partner)
    total = np.where(partner >= 0, gain + gain[partner], np.inf)
    at = int(total.argmin())
    if total[at] < best:
        moves = [at, int(partner[at])]
    return [(int(unit[m]), int(choice[m])) for m in moves]


def _running_best(gain: Floats, unit: Floats) -> tuple[Floats, Floats]:
    """For each prefix: index of the least gain in it, and of the least one of any other unit (-1: none)."""
    first, second = np.empty(len(gain), dtype=np.int64), np.empty(len(gain), dtype=np.int64)
    best, other = -1, -1
    for index, value in enumerate(gain.tolist()):
        if best < 0 or value < gain[best]:
            if best >= 0 and unit[best] != unit[index]:
                other = best
            best = index
        elif unit[index] != unit[best] and (other < 0 or value < gain[other]):
            other = index
        first[index], second[index] = best, other
    return first, second
