"""What the reproductions share: arguments, the model with its texts, losses of single windows, a JSON of results.

    python -m benchmarks.reproductions.NAME MODEL --text HELD_OUT --calibration OTHER --out results.json

A point is one plan measured on the held-out text: windows of 256 tokens, each read on its own. The mean loss of every
window is kept, so that two plans are compared window by window: the standard error of their difference is far smaller
than that of either. Points that the JSON file holds already are not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.allocation.plans import Results
from benchmarks.facts import facts
from mpq_kernels.allocate import Choice, Knapsack, Unit, make_choices, make_units, plan_bytes
from mpq_kernels.allocate.fast import solve_fast
from mpq_kernels.allocate.study import Study, weight_view
from mpq_kernels.allocate.units import allocated
from mpq_kernels.calibrate.hessians import damped
from mpq_kernels.dense.names import list_linears
from mpq_kernels.evaluate.perplexity import standard_error, token_windows
from mpq_kernels.format.reference import dequantize
from mpq_kernels.plan.plan import Plan
from mpq_kernels.plan.resolve import resolve
from mpq_kernels.quantize.gptq import quantize_with_hessian

WINDOW = 256
BATCH = 8


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Arguments that every reproduction on a given model takes."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("model", type=Path)
    found.add_argument("--text", type=Path, required=True, help="held out: neither trained nor calibrated on")
    found.add_argument("--calibration", type=Path, required=True)
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--tokens", type=int, default=20480)
    found.add_argument("--calibration-tokens", type=int, default=8192)
    found.add_argument("--quantizer", default="hqq")
    found.add_argument("--seed", type=int, default=0)
    return found


class Experiment:
    """A dense model in fp32, its linears, calibration and held-out windows, a `Study` to try plans with, and results.

    more: settings of the script itself. A results file that was made with other settings is refused.
    """

    def __init__(self, args: argparse.Namespace, choices: Sequence[Choice] | None = None, **more: Any) -> None:
        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.linears = list_linears(self.model)
        self.calibration = windows_of(tokenizer, args.calibration, args.calibration_tokens)
        self.text = windows_of(tokenizer, args.text, args.tokens)
        self.units: list[Unit] = list(make_units(self.linears, "linear", choices or make_choices([2, 3, 4])))
        self.study = Study(self.model, self.linears, self.units, self.calibration, args.quantizer)
        self.weights = sum(s.out_features * s.in_features for s in allocated(self.linears))
        self.results = open_results(
            args.out,
            {
                "model": args.model.name, "text": described(args.text), "tokens": self.text.numel(), "window": WINDOW,
                "calibration": described(args.calibration), "calibration_tokens": self.calibration.numel(),
                "quantizer": args.quantizer, "seed": args.seed, **more,
            },
        )  # fmt: skip
        self.dense = self.point("original", None)

    def point(
        self, name: str, plan: Plan | Mapping[str, torch.Tensor] | None, stored: int | None = None, brief: bool = False
    ) -> dict[str, Any]:
        """A plan measured, or weights [N, K] by name that no plan can give (stored: their bytes), or the dense model.

        brief: without the losses of its windows, for the many points of a curve.
        """
        found = self.results.get(name)
        if found is None:
            if plan is None:
                losses = window_losses(self.model, self.text)
            elif isinstance(plan, Plan):
                stored = plan_bytes(plan, self.linears, 2)
                with self.study.with_plan(plan):
                    losses = window_losses(self.model, self.text)
            else:
                for spec in allocated(self.linears):
                    weight_view(self.model, spec).copy_(plan[spec.name])
                losses = window_losses(self.model, self.text)
                self.study.restore()
            found = summary(losses, stored, self.weights)
            found = self.results.put(name, without_windows(found) if brief else found)
            print(f"{name:40} ppl {found['ppl']:.3f} bpw {found['bpw']}", flush=True)
        return found

    def gptq_point(self, name: str, plan: Plan) -> dict[str, Any]:
        """A plan measured with the package's GPTQ: Hessians of the dense model for all linears at once, 1% damping."""
        found: dict[str, Any] | None = self.results.get(name)
        if found is not None:
            return found
        values = {}
        for weight in resolve(plan, self.linears).weights:
            for member in weight.members:
                key = member.spec.name
                hessian = damped(self.study.inputs.moments[key].clone(), 0.01).double()
                values[key] = dequantize(
                    quantize_with_hessian(self.study.dense[key], member.layout, None, hessian, key)
                )
        return self.point(name, values, plan_bytes(plan, self.linears, 2))


def solve(
    units: Sequence[Unit],
    losses: Sequence[Sequence[float]],
    limit: float,
    costs: Sequence[Sequence[float]] | None = None,
) -> tuple[tuple[int, ...], int, float]:
    """(picks, bytes, loss) of least loss with whole units only; limit and costs: bytes unless costs are given."""
    sizes = [[float(b) for b in unit.bytes] for unit in units]
    problem = Knapsack.of(costs or sizes, losses, limit)
    picks = solve_fast(problem)
    stored = sum(unit.bytes[pick] for unit, pick in zip(units, picks, strict=True))
    return picks, stored, problem.loss_of(picks)


def compare(one: dict[str, Any], other: dict[str, Any]) -> str:
    """ "-0.0123 +- 0.0004": the difference of losses in words."""
    return "{:+.4f} +- {:.4f}".format(*difference(one, other))


def windows_of(tokenizer: Any, path: Path, tokens: int) -> torch.Tensor:
    """Token ids int64 [windows, WINDOW] of the start of a file."""
    return token_windows(tokenizer, path.read_text(encoding="utf-8"), WINDOW, tokens)


def described(path: Path) -> str:
    """Name and digest of a text, so that a figure can be made again."""
    return f"{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def open_results(path: Path, settings: dict[str, Any]) -> Results:
    """Results of these settings, with the machine, the versions and the commit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = Results(path, settings)
    results.data.setdefault("about", []).append(facts(torch.device("cpu")))
    return results


@torch.no_grad()
def window_losses(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each window, nats a token, fp64 [windows]."""
    out = []
    for x in rows.split(BATCH):
        logits = model(input_ids=x, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none")
        out.append(losses.double().view(len(x), -1).mean(1))
    return torch.cat(out)


def summary(losses: torch.Tensor, stored: int | None, weights: int) -> dict[str, Any]:
    """What is kept of a point. windows: losses in one line of text, 5 digits."""
    mean = float(losses.mean())
    return {
        "ppl": math.exp(mean), "nll": mean, "stderr": standard_error(losses), "bytes": stored,
        "bpw": None if stored is None else round(8 * stored / weights, 5),
        "windows": " ".join(f"{value:.5f}" for value in losses.tolist()),
    }  # fmt: skip


def without_windows(point: dict[str, Any]) -> dict[str, Any]:
    """A point without the losses of its windows, where there are many."""
    return {key: value for key, value in point.items() if key != "windows"}


def difference(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Mean of one's losses minus the other's on the same windows, and its standard error: nats a token."""
    pairs = zip(one["windows"].split(), other["windows"].split(), strict=True)
    gaps = [float(a) - float(b) for a, b in pairs]
    return statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
