"""Do losses of single linears add up? Their sum against the loss of all together, for random plans, width by width.

    python -m benchmarks.reproductions.additivity MODEL --text FILE --calibration FILE --out results.json

Claim: the loss of a plan is the sum of the losses of its parts (CalibTIP, https://arxiv.org/abs/2006.10518; Q-Palette,
https://arxiv.org/abs/2509.20214). Loss: KL to the original, nats a token, on the calibration text, as allocators
see it. A random plan has one width for a half of the linears, drawn anew for each plan; the others stay dense. In a
second set every linear is quantized, at the width or at the next one. R2 is the squared correlation, over plans, of the
sum with the joint KL.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.allocation.reproductions.common import Experiment, parser
from mpq_kernels.allocate import make_choices

WIDTHS = (8, 7, 6, 5, 4, 3, 2)


def single(experiment: Experiment, bits: int) -> list[float]:
    """KL with each linear alone at a width."""
    study = experiment.study
    found = experiment.results.get(f"{bits} bits, single")
    if found is None:
        found = []
        for unit in study.units:
            with study.with_unit(unit, next(c for c in unit.choices if c.bits == bits)):
                found.append(study.kl())
        experiment.results.put(f"{bits} bits, single", found)
    return list(found)


def joint(experiment: Experiment, widths: Sequence[int | None]) -> float:
    """KL with a width for every linear; None: dense."""
    study = experiment.study
    try:
        for unit, bits in zip(study.units, widths, strict=True):
            if bits is not None:
                study.write(unit, next(c for c in unit.choices if c.bits == bits))
        return study.kl()
    finally:
        study.restore()


def half(units: int, bits: int, draw: random.Random) -> list[int | None]:
    """A width for a random half of the linears."""
    taken = set(draw.sample(range(units), units // 2))
    return [bits if index in taken else None for index in range(units)]


def neighbours(units: int, bits: int, draw: random.Random) -> list[int | None]:
    """A width or the next one for every linear, half and half."""
    taken = set(draw.sample(range(units), units // 2))
    return [bits if index in taken else bits + 1 for index in range(units)]


def fit(sums: Sequence[float], joints: Sequence[float]) -> dict[str, Any]:
    """How well sums tell joint losses."""
    return {
        "r2": statistics.correlation(sums, joints) ** 2,
        "joint_over_sum": statistics.mean(joints) / statistics.mean(sums),
        "sum": statistics.mean(sums), "joint": statistics.mean(joints),
        "spread_of_joint": statistics.stdev(joints) / statistics.mean(joints),
        "plans": len(sums), "sums": list(sums), "joints": list(joints),
    }  # fmt: skip


def main() -> None:
    """Measure what is missing, print the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--group-size", type=int, default=64)
    arguments.add_argument("--plans", type=int, default=40)
    args = arguments.parse_args()
    choices = make_choices(WIDTHS, [args.group_size])
    experiment = Experiment(args, choices, group_size=args.group_size, plans=args.plans)
    print("| bits | set | sum of KL | joint KL | joint / sum | spread | R2 |")
    for bits in WIDTHS:
        alone = {width: single(experiment, width) for width in {bits, min(bits + 1, 8)}}
        for name, make in (("half dense", half), ("two widths", neighbours)):
            if make is neighbours and bits == 8:
                continue
            found = experiment.results.get(f"{bits} bits, {name}")
            if found is None:
                draw = random.Random(f"{args.seed} {bits} {name}")
                plans = [make(len(experiment.units), bits, draw) for _ in range(args.plans)]
                sums = [sum(alone[b][i] for i, b in enumerate(plan) if b is not None) for plan in plans]
                found = fit(sums, [joint(experiment, plan) for plan in plans])
                experiment.results.put(f"{bits} bits, {name}", found)
            cells = [f"{found[key]:.3g}" for key in ("sum", "joint")] + [f"{found['joint_over_sum']:.2f}"]
            print(
                "|", bits, "|", name, "|", *cells, f"{found['spread_of_joint']:.1%}", f"{found['r2']:.3f}", flush=True
            )


if __name__ == "__main__":
    main()
