"""Widths for single linears against widths for fuse groups and whole layers, at equal bytes.

    python -m benchmarks.reproductions.granularity MODEL --text FILE --calibration FILE --out results.json

Claim: finer units lose less; in the ideal-quantizer objective of Q-Palette (https://arxiv.org/abs/2509.20214) linears
beat layers by 17% at 3 bits. Layers are solved first, within a budget; what that plan stores is the limit for fuse
groups and linears. Whole units only: no row blocks fill the rest. `shuffled` is the linear plan's choices moved to
other linears of the same shape: the same bytes.
"""

from __future__ import annotations

import random

from benchmarks.allocation.plans import shuffled
from benchmarks.allocation.reproductions.common import Experiment, compare, parser, solve
from mpq_kernels.allocate import make_choices, make_plan, make_units
from mpq_kernels.allocate.methods import METHODS
from mpq_kernels.allocate.study import Study


def main() -> None:
    """Measure what is missing, print the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--bits", default="2,3,4")
    arguments.add_argument("--group-size", type=int, default=64)
    arguments.add_argument("--budgets", default="2.6,3.0,3.4,3.8", help="stored bits a weight")
    arguments.add_argument("--methods", default="fisher,measured")
    arguments.add_argument("--shuffles", type=int, default=5)
    args = arguments.parse_args()
    choices = make_choices([int(b) for b in args.bits.split(",")], [args.group_size])
    more = {name: getattr(args, name) for name in ("bits", "group_size", "budgets", "methods", "shuffles")}
    experiment = Experiment(args, choices, **more)
    study, linears = experiment.study, experiment.linears
    for method in args.methods.split(","):
        tables = {}
        for kind in ("layer", "fuse", "linear"):
            units = list(make_units(linears, kind, choices))
            trial = Study(study.model, linears, units, study.tokens, study.quantizer)
            name = f"{method} {kind} losses"
            losses = experiment.results.get(name) or experiment.results.put(name, METHODS[method].run(trial))
            tables[kind] = (units, losses)
        for budget in [float(value) for value in args.budgets.split(",")]:
            limit = float(int(budget * experiment.weights / 8))
            points = {}
            for kind, (units, losses) in tables.items():
                picks, stored, loss = solve(units, losses, limit)
                if kind == "layer":
                    limit = stored
                point = experiment.point(f"{method} {budget:g} {kind}", make_plan(linears, units, picks))
                assert point["bytes"] == stored <= limit
                point["objective"] = loss
                points[kind] = experiment.results.put(f"{method} {budget:g} {kind}", point)
                print(method, budget, kind, f"objective {loss:.4g}, {compare(point, points['layer'])}", flush=True)
            for seed in range(args.shuffles):
                moved, _ = shuffled(units, picks, {}, random.Random(f"{args.seed} {seed}").randrange(1 << 30))
                name = f"{method} {budget:g} shuffled {seed}"
                point = experiment.point(name, make_plan(linears, units, moved))
                print(method, budget, f"shuffled {seed}, {compare(point, points['layer'])}", flush=True)


if __name__ == "__main__":
    main()
