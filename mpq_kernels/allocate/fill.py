"""The last fraction of a budget: some rows of a unit get its next choice, as row-block segments.

    picks of whole units + slack in bytes --fill--> {unit: Split(choice, blocks)}

A block is 64 rows of one cell, the height of a supertile, so bytes stay exact. What is left afterwards is less than the
bytes of one more block for every unit that could take one. The loss of a split unit is counted in proportion to its
weights on either side; for the relaxed solution of the knapsack that is the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..format.codes import TILE_N
from .knapsack import Knapsack
from .units import Cell, Choice, Unit


@dataclass(frozen=True)
class Split:
    """The first `blocks` blocks of 64 rows of a unit's cells, one cell after the other, take `choice` (its index)."""

    choice: int
    blocks: int


@dataclass(frozen=True)
class Filled:
    """Picks and splits together, with their bytes and their loss."""

    picks: tuple[int, ...]
    splits: dict[int, Split]
    bytes: int
    loss: float


def fill(units: Sequence[Unit], problem: Knapsack, picks: Sequence[int]) -> Filled:
    """Spend what `picks` leave of the budget in bytes: the split that lowers the loss most, again and again."""
    chosen, splits = list(picks), dict[int, Split]()
    slack = int(problem.budget) - sum(u.bytes[p] for u, p in zip(units, chosen, strict=True))
    while True:
        best: tuple[float, int, Split, int] | None = None
        for index, unit in enumerate(units):
            if index in splits:
                continue
            for choice in _dearer(unit, problem, index, chosen[index]):
                found = _most_blocks(unit, chosen[index], choice, slack)
                if found is None:
                    continue
                blocks, cost, part = found
                gain = part * float(problem.losses[index][chosen[index]] - problem.losses[index][choice])
                if best is None or gain > best[0]:
                    best = (gain, index, Split(choice, blocks), cost)
        if best is None:
            break
        _, index, split, cost = best
        slack -= cost
        if split.blocks == len(_blocks(units[index])):
            chosen[index] = split.choice
        else:
            splits[index] = split
    loss = problem.loss_of(chosen)
    for index, split in splits.items():
        part = _weights(units[index])[split.blocks - 1] / units[index].weights
        loss -= part * float(problem.losses[index][chosen[index]] - problem.losses[index][split.choice])
    return Filled(tuple(chosen), splits, int(problem.budget) - slack, loss)


def rectangles(unit: Unit, pick: int, split: Split | None) -> list[tuple[Cell, Choice]]:
    """The parts of a unit's cells with what each of them gets."""
    out: list[tuple[Cell, Choice]] = []
    left = 0 if split is None else split.blocks
    for cell in unit.cells:
        rows = min(cell.rows, left * TILE_N)
        left -= -(-rows // TILE_N)
        if rows and split is not None:
            out.append((Cell(cell.spec, cell.n0, cell.n0 + rows, cell.k0, cell.k1), unit.choices[split.choice]))
        if rows < cell.rows:
            out.append((Cell(cell.spec, cell.n0 + rows, cell.n1, cell.k0, cell.k1), unit.choices[pick]))
    return out


def _dearer(unit: Unit, problem: Knapsack, index: int, pick: int) -> list[int]:
    """Choices that cost more bytes and lose less. Kept weights are whole or not at all."""
    losses = problem.losses[index]
    if unit.choices[pick].kept:
        return []
    found = []
    for choice, option in enumerate(unit.choices):
        more = unit.bytes[choice] > unit.bytes[pick] and losses[choice] < losses[pick]
        if more and (not option.kept):
            found.append(choice)
    return found


def _most_blocks(unit: Unit, pick: int, choice: int, slack: int) -> tuple[int, int, float] | None:
    """(blocks, bytes, part of the unit's weights) of the largest split within `slack`; None when not one block fits."""
    before = [b for cell in unit.cells for b in cell.block_bytes(unit.choices[pick], unit.itemsize)]
    after = [b for cell in unit.cells for b in cell.block_bytes(unit.choices[choice], unit.itemsize)]
    count, cost = 0, 0
    for one, other in zip(before, after, strict=True):
        if cost + other - one > slack:
            break
        cost += other - one
        count += 1
    if not count:
        return None
    return count, cost, _weights(unit)[count - 1] / unit.weights


def _blocks(unit: Unit) -> list[int]:
    """Weights of each block."""
    sizes = []
    for cell in unit.cells:
        full, rest = divmod(cell.rows, TILE_N)
        sizes += [TILE_N * cell.cols] * full + ([rest * cell.cols] if rest else [])
    return sizes


def _weights(unit: Unit) -> list[int]:
    """Weights of the first 1, 2, ... blocks."""
    return list(accumulate(_blocks(unit)))
