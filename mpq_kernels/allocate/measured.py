"""Measured losses: the divergence from the dense model on calibration tokens when units are really quantized.

    measured   one unit at a time (parts of one linear together), all others dense: blind to how errors add up
    greedy     units are lowered one after the other and stay so: each step is measured where it happens
    refine     around a finished plan: each unit one step up, all others as the plan says; losses are rescaled, the
               knapsack is solved again, and the plan with the least measured divergence is kept

Measuring every width and group size would take units x choices passes. Only some choices, the probes, are measured; any
other has the loss of the nearest probe times the ratio of their predicted losses (`fisher`, or `hessian` with experts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ..errors import PlanError
from .predicted import predicted_losses
from .units import Unit

if TYPE_CHECKING:
    from .solve import Allocation
    from .study import Study

PROBE_BITS = (2, 3)
LEAST = 1e-9  # nats: what rounding in fp32 gives for a model that is not changed at all


def probes(unit: Unit) -> list[int]:
    """Indexes of the choices that are measured: of PROBE_BITS, or the narrowest, in the group size nearest to 64."""
    packed = [i for i, choice in enumerate(unit.choices) if not choice.kept]
    if not packed:
        return []
    widths = sorted({unit.choices[i].bits for i in packed})
    wanted = [bits for bits in widths if bits in PROBE_BITS] or widths[:1]
    cols = unit.cells[0].cols

    def far(index: int) -> float:
        size = unit.choices[index].group_size
        return abs(math.log((cols if size == -1 else size) / 64))

    return [min((i for i in packed if unit.choices[i].bits == bits), key=far) for bits in wanted]


def measured_losses(study: Study) -> list[list[float]]:
    """KL of the model with one unit under one choice, in nats a token.

    Units that are parts of one linear are lowered together and share what that costs in the ratio of their predicted
    losses: hundreds of passes fewer, and differences that are above the noise.
    """
    shape = predicted_losses(study)
    together: dict[tuple[str, ...], list[int]] = {}
    for index, unit in enumerate(study.units):
        together.setdefault(tuple(dict.fromkeys(cell.spec.name for cell in unit.cells)), []).append(index)
    table: dict[int, list[float]] = {}
    for done, members in enumerate(together.values(), start=1):
        found: dict[int, dict[int, float]] = {index: {} for index in members}
        units = {index: study.units[index] for index in members}
        places = {index: {unit.choices[i].bits: i for i in probes(unit)} for index, unit in units.items()}
        for bits in sorted({bits for by_bits in places.values() for bits in by_bits}):
            lowered = {index: by_bits[bits] for index, by_bits in places.items() if bits in by_bits}
            with ExitStack() as stack:
                for index, place in lowered.items():
                    stack.enter_context(study.with_unit(units[index], units[index].choices[place]))
                cost = max(study.kl(), LEAST)
            for index, share in _shares(study, lowered, shape).items():
                found[index][lowered[index]] = cost * share
        for index in members:
            table[index] = spread(units[index], found[index], shape[index])
        study.report(done, "measured")
    return [table[index] for index in range(len(study.units))]


def _shares(study: Study, lowered: Mapping[int, int], shape: Sequence[Sequence[float]]) -> dict[int, float]:
    """Each unit's part of what all cost together: as predicted, or by its weights where no loss is predicted."""
    parts = {index: shape[index][place] for index, place in lowered.items()}
    if not sum(parts.values()) > 0:
        parts = {index: float(study.units[index].weights) for index in lowered}
    whole = sum(parts.values())
    return {index: part / whole for index, part in parts.items()}


def spread(unit: Unit, found: dict[int, float], shape: Sequence[float]) -> list[float]:
    """Losses of all choices from those of the probes: nearest in bits, times the ratio of predicted losses."""
    row = []
    for place, choice in enumerate(unit.choices):
        if choice.kept:
            row.append(0.0)
            continue
        near = min(found, key=lambda i: (abs(unit.choices[i].bits - choice.bits), i))
        row.append(found[near] * (shape[place] / shape[near] if shape[near] > 0 else 1.0))
    return row


def greedy_losses(study: Study) -> list[list[float]]:
    """KL added by each step down, measured in a model that is already lowered.

    All units start at the widest probe. Then, width by width, they go one step down in the order of what the step cost
    alone, and stay there: a unit's step is charged with what it adds to the errors of those before it.
    """
    shape = predicted_losses(study)
    at = [sorted(probes(unit), key=lambda i, u=unit: -u.choices[i].bits) for unit in study.units]  # type: ignore[misc]
    if not all(at):
        raise PlanError("greedy lowers widths step by step, and a unit can only be kept; give it a width of 1..8")
    found: list[dict[int, float]] = [{} for _ in study.units]
    try:
        previous = 0.0
        for depth in range(max(len(places) for places in at)):
            order = sorted((u for u in range(len(at)) if depth < len(at[u])), key=lambda u: shape[u][at[u][depth]])
            for done, index in enumerate(order, start=1):
                unit, place = study.units[index], at[index][depth]
                study.write(unit, unit.choices[place])
                now = study.kl()
                before = found[index][at[index][depth - 1]] if depth else 0.0
                found[index][place] = before + max(now - previous, LEAST)
                previous = now
                study.report(done, f"greedy {depth + 1}")
    finally:
        study.restore()
    return [spread(unit, row, errors) for unit, row, errors in zip(study.units, found, shape, strict=True)]


def refine(
    study: Study,
    losses: Sequence[Sequence[float]],
    solve: Callable[[Sequence[Sequence[float]]], Allocation],
    rounds: int = 2,
) -> tuple[Allocation, list[float]]:
    """The best of several allocations by measured KL, and those KLs: first the one of `losses`, then a round each.

    solve: losses -> Allocation at the budget. In a round every unit takes its next better choice on its own, all others
    as the last plan says; its losses are scaled by what that gained against what they had predicted.
    """
    table = [list(row) for row in losses]
    best, kls = None, []
    allocation = solve(table)
    for step in range(rounds + 1):
        with study.with_plan(allocation.plan):
            kl = study.kl()
            kls.append(kl)
            if best is None or kl < min(kls[:-1]):
                best = allocation
            if step == rounds:
                break
            ratios = [_ratio(study, index, allocation.picks[index], table, kl) for index in range(len(table))]
        known = sorted(ratio for ratio in ratios if ratio is not None)
        middle = known[len(known) // 2] if known else 1.0
        for row, ratio in zip(table, ratios, strict=True):
            # The square root damps the step: a ratio is one noisy difference of two nearly equal numbers.
            factor = math.sqrt((middle if ratio is None else ratio) / middle)
            row[:] = [value * min(4.0, max(0.25, factor)) for value in row]
        allocation = solve(table)
    assert best is not None
    return best, kls


def _ratio(study: Study, index: int, pick: int, table: list[list[float]], kl: float) -> float | None:
    """Measured gain of a unit's next better choice over the predicted one; None when it has none."""
    unit = study.units[index]
    better = [
        i for i in range(len(unit.choices)) if unit.bytes[i] > unit.bytes[pick] and table[index][i] < table[index][pick]
    ]
    if not better:
        return None
    place = min(better, key=lambda i: (abs(unit.choices[i].bits - unit.choices[pick].bits - 1), unit.bytes[i]))
    with study.with_unit(unit, unit.choices[place]):
        gain = kl - study.kl()
    study.report(index + 1, "refine")
    return max(gain, LEAST) / max(table[index][pick] - table[index][place], LEAST)
