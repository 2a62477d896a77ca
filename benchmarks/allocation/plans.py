"""Allocated plans against uniform and random ones at the same stored bytes: perplexity and KL on a text.

    python -m benchmarks.allocation MODEL --text FILE --calibration FILE --out results.json [--budgets 2.5,3,4]

For each budget (stored bits for each weight of the allocated linears) three things are measured on the same tokens, all
with the same quantizer:

    allocated   the plan of least loss by a method
    uniform     the best, by its perplexity, of all uniform plans of at most the budget: every width and group size
    random      the choices of the allocated plan, shuffled among the units of equal shape and stored bytes: the same
                choices as often, the same bytes; mean of so many shuffles

Results are kept in the JSON file as they come, and what it holds already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.facts import facts
from mpq_kernels.allocate import Budget, Unit, allocate, make_choices, make_plan, make_units, plan_bytes
from mpq_kernels.allocate.fill import Split
from mpq_kernels.allocate.methods import METHODS
from mpq_kernels.allocate.study import Study
from mpq_kernels.allocate.units import GRANULARITIES, Choice
from mpq_kernels.dense.linears import LinearSpec
from mpq_kernels.dense.names import list_linears
from mpq_kernels.evaluate.divergence import divergence, predict
from mpq_kernels.evaluate.perplexity import token_windows
from mpq_kernels.plan.plan import Plan


class Results:
    """Measured plans by name, in a JSON file that is rewritten after each. Losses and plans lie in one beside it."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.beside = path.with_suffix(".work.json")
        self.work: dict[str, Any] = json.loads(self.beside.read_text()) if self.beside.exists() else {}
        held = json.loads(path.read_text()) if path.exists() else {"settings": settings, "points": {}}
        if held["settings"] != settings:
            raise SystemExit(f"{path} was made with other settings; choose another file or remove it")
        self.data = held

    def get(self, name: str) -> Any:
        """A point that was measured before, or None."""
        return self.data["points"].get(name)

    def put(self, name: str, value: Any) -> Any:
        """Keep a point."""
        self.data["points"][name] = value
        self._write(self.path, json.dumps(self.data, indent=1))
        return value

    def keep(self, name: str, value: Any) -> Any:
        """Keep what is needed to go on, or to look at, and is no result."""
        self.work[name] = value
        self._write(self.beside, json.dumps(self.work))
        return value

    @staticmethod
    def _write(path: Path, text: str) -> None:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text + "\n")
        temporary.replace(path)


def shuffled(
    units: list[Unit], picks: Sequence[int], splits: Mapping[int, Split], seed: int
) -> tuple[list[int], dict[int, Split]]:
    """Picks and splits permuted at random among units of the same rows and the same bytes under every choice."""
    classes: dict[tuple[Any, ...], list[int]] = {}
    for index, unit in enumerate(units):
        rows = tuple(cell.rows for cell in unit.cells)
        classes.setdefault((rows, unit.bytes, unit.choices), []).append(index)
    out, cut, draw = list(picks), dict[int, Split](), random.Random(seed)
    for members in classes.values():
        moved = list(members)
        draw.shuffle(moved)
        for index, source in zip(members, moved, strict=True):
            out[index] = picks[source]
            if source in splits:
                cut[index] = splits[source]
    return out, cut


def model_parser(text: str) -> argparse.ArgumentParser:
    """What every measurement over a model, a text and a calibration text is told."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--group-sizes", default="32,64,128")
    parser.add_argument("--quantizer", default="hqq")
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    return parser


def opened(args: argparse.Namespace) -> tuple[Any, list[LinearSpec], tuple[Choice, ...], torch.Tensor, torch.Tensor]:
    """(dense model in fp32, its linears, choices, windows of the calibration text, windows of the text)."""
    torch.set_grad_enabled(False)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    bits, sizes = ([int(v) for v in text.split(",")] for text in (args.bits, args.group_sizes))
    rows = token_windows(tokenizer, args.calibration.read_text(encoding="utf-8"), 256, args.calibration_tokens)
    text = token_windows(tokenizer, args.text.read_text(encoding="utf-8"), 256, args.tokens)
    return model, list_linears(model), make_choices(bits, sizes), rows, text


def main() -> None:
    """Measure, and print the table."""
    parser = model_parser(__doc__)
    parser.add_argument("--budgets", default="2.5,2.75,3,3.5,4")
    parser.add_argument("--method", default="measured", choices=list(METHODS))
    parser.add_argument("--granularity", default="row", choices=list(GRANULARITIES))
    parser.add_argument("--span", type=int, default=64, help="rows or columns of a unit, where it is part of a linear")
    parser.add_argument("--bits", default="1,2,3,4,5,6")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--random", type=int, default=20)
    args = parser.parse_args()
    model, linears, choices, rows, text = opened(args)
    units = list(make_units(linears, args.granularity, choices, span=args.span))
    names = ("method", "granularity", "span", "bits", "group_sizes", "quantizer", "calibration_tokens", "tokens")
    settings = {"model": args.model.name, "text": args.text.name, "calibration": args.calibration.name}
    results = Results(args.out, settings | {name: getattr(args, name) for name in names})
    results.data.setdefault("about", facts(torch.device("cpu")))
    study = Study(model, linears, units, rows, args.quantizer)
    original = predict(model, text, 64)
    started = time.monotonic()
    if "losses" not in results.work:
        results.keep("losses", METHODS[args.method].run(study))
        results.data["method_seconds"] = round(time.monotonic() - started, 1)
    losses = results.work["losses"]
    weights = sum(unit.weights for unit in units)
    seen: dict[str, Any] = {}  # few units of one shape have few orders: the same plan is measured once

    def measure(name: str, plan: Plan, stored: int) -> dict[str, Any]:
        found = results.get(name) or seen.get(plan.to_json())
        if found is None:
            with study.with_plan(plan):
                got = divergence(model, original)
            found = results.put(name, {"bpw": 8 * stored / weights, "ppl": got.ppl, "kl": got.kl, "top1": got.top1})
            results.data["original_ppl"] = got.original_ppl
            print(name, found, flush=True)
        seen[plan.to_json()] = results.put(name, found)
        return found

    print("| budget | allocated | best uniform | random | gap against uniform | gap against random |")
    for value in [float(v) for v in args.budgets.split(",")]:
        got = allocate(linears, units, losses, Budget("bits", value), model=args.model.name)
        ours = measure(f"{value:g} allocated", got.plan, got.bytes)
        results.keep(f"{value:g} plan", json.loads(got.plan.to_json()))
        uniform = [
            (f"uniform {c.text}", [u.choices.index(c) for u in units])
            for c in units[0].choices
            if sum(u.bytes[u.choices.index(c)] for u in units) * 8 <= value * weights
        ]
        near = sorted(uniform, key=lambda item: -sum(u.bytes[p] for u, p in zip(units, item[1], strict=True)))[:6]
        flat = [
            measure(name, make_plan(linears, units, picks), sum(u.bytes[p] for u, p in zip(units, picks, strict=True)))
            for name, picks in near
        ]
        shuffles = []
        for seed in range(args.random):
            plan = make_plan(linears, units, *shuffled(units, got.picks, got.splits, seed))
            assert plan_bytes(plan, linears, 2) == got.bytes
            shuffles.append(measure(f"{value:g} random {seed}", plan, got.bytes))
        base = results.data["original_ppl"]
        mean = statistics.mean(point["ppl"] for point in shuffles) if shuffles else float("nan")
        best = min(point["ppl"] for point in flat)
        shares = [f"{1 - (ours['ppl'] - base) / (other - base):.1%}" for other in (best, mean)]
        cells = [f"{value:g}", *(f"{ppl:.3f}" for ppl in (ours["ppl"], best, mean)), *shares]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
