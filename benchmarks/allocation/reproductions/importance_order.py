"""Lowering layers in the order of an importance score, its reverse, and random orders: perplexity on the way.

    python -m benchmarks.reproductions.importance_order MODEL --text FILE --calibration FILE --out results.json

Claim (LWQ, https://arxiv.org/abs/2406.17415): layers scored by LIM (how much they turn their input) or ZD (the fewer
weights in the tail, the more important) can be lowered, the least important first, with less loss than in other
orders. All layers start at --high bits; one after the other goes to --low. The area is that under perplexity against
the part of the weights lowered, by trapezoids. `measured` orders by the KL of each alone on the calibration text. With
`--unit linear` single linears are lowered, at --points places along the way; LIM has no score for them.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from itertools import accumulate, pairwise

from benchmarks.allocation.reproductions.common import Experiment, parser
from mpq_kernels.allocate import Unit, make_choices, make_plan, make_units
from mpq_kernels.allocate.inputs import layer_cosines
from mpq_kernels.allocate.study import Study


def scores(experiment: Experiment, units: Sequence[Unit], low: int) -> dict[str, list[float]]:
    """Importance of every unit by each score; the larger, the later it is lowered."""
    study = experiment.study
    found: dict[str, list[float]] = {"zd": [], "measured": []}
    if units[0].name.rpartition(".")[2].isdigit():
        found["lim"] = [-cosine for cosine in layer_cosines(study.model, study.tokens)]
    trial = Study(study.model, study.linears, units, study.tokens, study.quantizer)
    for unit in units:
        weights = [study.dense[cell.spec.name].flatten() for cell in unit.cells]
        tails = [float(((w - w.mean()) / w.std() > 1).float().sum()) for w in weights]
        found["zd"].append(-sum(tails) / unit.weights)
        with trial.with_unit(unit, next(c for c in unit.choices if c.bits == low)):
            found["measured"].append(trial.kl())
    return found


def area(
    experiment: Experiment, units: Sequence[Unit], order: Sequence[int], points: int, widths: tuple[int, int]
) -> tuple[float, list[tuple[float, float]]]:
    """(area, (part lowered, perplexity) at each stop) of lowering units in an order, least important first."""
    total = sum(unit.weights for unit in units)
    parts = [0.0, *(done / total for done in accumulate(units[index].weights for index in order))]
    stops = sorted({round(step * len(units) / points) for step in range(points + 1)})
    ppl = []
    for stop in stops:
        lowered = sorted(order[:stop])
        bits = [widths[1] if index in lowered else widths[0] for index in range(len(units))]
        picks = [next(i for i, c in enumerate(u.choices) if c.bits == b) for u, b in zip(units, bits, strict=True)]
        name = "lowered " + (" ".join(map(str, lowered)) or "none")
        ppl.append(experiment.point(name, make_plan(experiment.linears, units, picks), brief=True)["ppl"])
    places = list(zip([parts[stop] for stop in stops], ppl, strict=True))
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(places)), places


def main() -> None:
    """Measure what is missing, print the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--unit", choices=["layer", "linear"], default="layer")
    arguments.add_argument("--high", type=int, default=4)
    arguments.add_argument("--low", type=int, default=2)
    arguments.add_argument("--group-size", type=int, default=64)
    arguments.add_argument("--points", type=int, default=8)
    arguments.add_argument("--random", type=int, default=20)
    args = arguments.parse_args()
    more = {name: getattr(args, name) for name in ("unit", "high", "low", "group_size", "points", "random")}
    choices = make_choices([args.low, args.high], [args.group_size])
    experiment = Experiment(args, choices, **more)
    units = list(make_units(experiment.linears, args.unit, choices))
    found = experiment.results.get("scores") or experiment.results.put("scores", scores(experiment, units, args.low))
    orders: dict[str, list[int]] = {}
    for name, values in found.items():
        orders[name] = sorted(range(len(units)), key=lambda index, v=values: v[index])  # type: ignore[misc]
        orders[f"reverse {name}"] = orders[name][::-1]
    for seed in range(args.random):
        orders[f"random {seed}"] = random.Random(args.seed * 1000 + seed).sample(range(len(units)), len(units))
    areas = {}
    for name, order in orders.items():
        areas[name], places = area(experiment, units, order, args.points, (args.high, args.low))
        experiment.results.put(f"area {name}", {"area": areas[name], "order": order, "places": places})
    chance = [value for name, value in areas.items() if name.startswith("random")]
    mean, deviation = statistics.mean(chance), statistics.stdev(chance)
    print(f"random: mean {mean:.4f}, deviation {deviation:.4f}, {min(chance):.4f} to {max(chance):.4f}")
    rows = {}
    for name, value in areas.items():
        if not name.startswith("random"):
            better = sum(value < other for other in chance)
            rows[name] = {"area": value, "deviations": (value - mean) / deviation, "better_than": better}
            print(f"{name}: {value:.4f}, {(value - mean) / deviation:+.2f} deviations, below {better} of {len(chance)}")
    experiment.results.put("summary", {"mean": mean, "deviation": deviation, "random": len(chance), "orders": rows})


if __name__ == "__main__":
    main()
