"""Every allocation method on one model at one budget: seconds that its losses take, perplexity and KL of its plan.

    python -m benchmarks.allocation.methods MODEL --text FILE --calibration FILE --out results.json [--budget 3]
        [--methods lim,zd]

Each method starts from nothing, so that what two of them share (inputs, Hessians, candidates) is paid by both.
Results are kept in the JSON file as they come; what it holds is not measured again.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.allocation.plans import Results, model_parser, opened
from benchmarks.facts import facts
from mpq_kernels.allocate import Budget, allocate, make_units
from mpq_kernels.allocate.methods import METHODS, check_method
from mpq_kernels.allocate.study import Study
from mpq_kernels.allocate.units import GRANULARITIES
from mpq_kernels.errors import MPQError
from mpq_kernels.evaluate.divergence import divergence, predict


def main() -> None:
    """Measure, and print a line for each method as it comes."""
    parser = model_parser(__doc__)
    parser.add_argument("--budget", type=float, default=3.0, help="stored bits for each weight")
    parser.add_argument("--granularity", default="linear", choices=list(GRANULARITIES))
    parser.add_argument("--bits", default="2,3,4,5,6")
    parser.add_argument("--tokens", type=int, default=10240)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated; all without it")
    args = parser.parse_args()
    model, linears, choices, rows, text = opened(args)
    units = make_units(linears, args.granularity, choices)
    original = predict(model, text, 64)
    settings = {"model": args.model.name, "text": args.text.name, "calibration": args.calibration.name}
    names = ("budget", "granularity", "bits", "group_sizes", "quantizer", "calibration_tokens", "tokens")
    results = Results(args.out, settings | {name: getattr(args, name) for name in names})
    results.data["about"] = facts(torch.device("cpu"))
    for name in args.methods.split(","):
        check_method(name)
        if results.get(name) is None:
            run = METHODS[name].run
            results.put(name, measure(Study(model, linears, units, rows, args.quantizer), run, args, original))
        print(name, results.get(name), flush=True)


def measure(study: Study, run: Any, args: argparse.Namespace, original: Any) -> dict[str, Any]:
    """Losses, timed; the plan at the budget; what it loses. A method that refuses leaves its reason."""
    started = time.monotonic()
    try:
        losses = run(study)
    except MPQError as error:
        return {"refused": str(error)}
    seconds = time.monotonic() - started
    got = allocate(study.linears, study.units, losses, Budget("bits", args.budget), model=args.model.name)
    with study.with_plan(got.plan):
        found = divergence(study.model, original)
    weights = sum(unit.weights for unit in study.units)
    return {
        "seconds": round(seconds, 1), "bpw": 8 * got.bytes / weights, "ppl": found.ppl, "kl": found.kl,
        "original_ppl": found.original_ppl,
    }  # fmt: skip


if __name__ == "__main__":
    main()
