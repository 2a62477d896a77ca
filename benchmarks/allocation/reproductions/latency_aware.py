"""Plans for a measured latency against plans for bytes, at equal predicted microseconds, on this CPU.

    python -m benchmarks.reproductions.latency_aware MODEL --text FILE --calibration FILE --out FILE --table FILE

Claim (Q-Palette, https://arxiv.org/abs/2509.20214): at equal latency, a plan solved for latency loses less than one
solved for memory; by its committed coefficients the objective is 16% to 25% lower. The table is measured here when FILE
is not there: every shape of the model, width and group size through MixedLinear, one token in bf16, copies of 8 MB in
turn, median of calls, three rounds over all entries and the middle one kept. For every budget in bytes the memory plan
is solved first, and what it takes by the table is the budget of the latency plan. The objective of that can only be
lower (the memory plan fits its budget), so perplexity decides, and `measured_us`: all linears of the packed model.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.allocation.reproductions.common import Experiment, compare, parser, solve
from benchmarks.facts import facts
from mpq_kernels import MixedLinear, Plan, replace_linears
from mpq_kernels.allocate import Choice, LatencyTable, make_choices, make_plan
from mpq_kernels.allocate.latency import costs
from mpq_kernels.allocate.methods import METHODS
from mpq_kernels.allocate.timing import measure_latencies
from mpq_kernels.evaluate.speed import time_calls

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
ROUNDS, COPIES_MB = 3, 8


def table_of(args: argparse.Namespace, experiment: Experiment, choices: Sequence[Choice]) -> LatencyTable:
    """The table in the file, measured first where there is none."""
    if not args.table.exists():
        table, spread = measure_latencies(
            experiment.linears,
            choices,
            device=CPU,
            dtype=DTYPE,
            rounds=ROUNDS,
            seconds=args.seconds,
            total_mb=COPIES_MB,
        )
        data = json.loads(table.to_json()) | {"about": facts(CPU), "largest_spread_of_rounds": spread}
        args.table.write_text(json.dumps(data, indent=1) + "\n")
    return LatencyTable.from_file(args.table)


def pass_us(experiment: Experiment, plan: Plan, seconds: float) -> float:
    """Median microseconds of all packed linears of the model, one after the other, one token."""
    model = copy.deepcopy(experiment.model).to(DTYPE)
    replace_linears(model, plan, experiment.study.quantizer)
    layers = [module for module in model.modules() if isinstance(module, MixedLinear)]
    inputs = {layer.in_features: torch.randn(1, layer.in_features).to(DTYPE) for layer in layers}

    def one() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return statistics.median(time_calls([one], CPU, seconds))


def main() -> None:
    """Measure what is missing, print the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--table", type=Path, required=True)
    arguments.add_argument("--bits", default="2,3,4,5,6,8")
    arguments.add_argument("--group-sizes", default="32,64,128")
    arguments.add_argument("--budgets", default="2.5,2.75,3.0,3.5,4.0", help="stored bits a weight of the memory plan")
    arguments.add_argument("--method", default="fisher")
    arguments.add_argument("--seconds", type=float, default=0.15)
    args = arguments.parse_args()
    bits, sizes = ([int(v) for v in text.split(",")] for text in (args.bits, args.group_sizes))
    choices = make_choices(bits, sizes)
    more = {name: getattr(args, name) for name in ("bits", "group_sizes", "budgets", "method")}
    experiment = Experiment(args, choices, **more, table=args.table.name)
    units = experiment.units
    table = costs(units, table_of(args, experiment, choices))
    losses = experiment.results.get("losses") or experiment.results.put(
        "losses", METHODS[args.method].run(experiment.study)
    )
    for budget in [float(value) for value in args.budgets.split(",")]:
        picks, _, _ = solve(units, losses, int(budget * experiment.weights / 8))
        limit = sum(row[pick] for row, pick in zip(table, picks, strict=True))
        points: dict[str, dict[str, Any]] = {}
        for kind, found in (("memory", picks), ("latency", solve(units, losses, limit, table)[0])):
            name, plan = f"{budget:g} {kind}", make_plan(experiment.linears, units, found)
            point = experiment.point(name, plan)
            if "us" not in point:
                point["objective"] = sum(row[pick] for row, pick in zip(losses, found, strict=True))
                point["us"] = sum(row[pick] for row, pick in zip(table, found, strict=True))
                point["measured_us"] = pass_us(experiment, plan, 1.0)
                experiment.results.put(name, point)
            points[kind] = point
            print(name, {key: point[key] for key in ("bpw", "us", "measured_us", "objective", "ppl")}, flush=True)
        print(f"{budget:g}: latency minus memory {compare(points['latency'], points['memory'])}", flush=True)


if __name__ == "__main__":
    main()
