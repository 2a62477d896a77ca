"""What of a token is not its packed products, eager and compiled, and what compiling takes.

    python benchmarks/models/compiled.py --models gutenberg-6m,llama-1b --json out.json

Each figure is the median of a round's steps, of the best of several rounds, in which eager steps, compiled steps and
the products alone take turns, so that a busy machine disturbs all three alike. Products alone are the same operators
called one after the other; the rest of a token is its time without theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mpq_kernels as mpq
from benchmarks.facts import facts, load_average
from benchmarks.models.generation import LLAMA_1B
from mpq_kernels.evaluate.speed import EagerSteps, now, synthetic_tokens
from mpq_kernels.evaluate.synthetic import config_linears, synthetic_model
from mpq_kernels.hf.compiled import CACHE_TOKENS, Decoder, compile_decoding
from mpq_kernels.nn.linear import packed_modules
from mpq_kernels.plan.plan import Plan

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FUSE = [
    {"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]},
    {"name": "gate_up_proj", "members": ["gate_proj", "up_proj"]},
]


def fused(plan: Plan) -> Plan:
    """The plan with q, k and v, and gate and up, as one weight each."""
    return Plan.model_validate(plan.model_dump(mode="json") | {"fuse": FUSE})


def stored_model(scratch: Path, bits: int) -> Any:
    """examples/gutenberg-6m, packed."""
    source, out = EXAMPLES / "gutenberg-6m", scratch / "packed"
    mpq.pack(source, out, fused(Plan.uniform(source, bits=bits)), quantizer="rtn")
    return mpq.load(out)


def shape_of_1b(scratch: Path, bits: int) -> Any:
    """A Llama of 1.1 billion weights without values that mean anything."""
    (scratch / "config.json").write_text(json.dumps(LLAMA_1B))
    return synthetic_model(scratch, fused(Plan.uniform(config_linears(scratch), bits=bits, lm_head=bits)))


MODELS: dict[str, Callable[[Path, int], Any]] = {"gutenberg-6m": stored_model, "llama-1b": shape_of_1b}


def products(model: Any) -> Callable[[], None]:
    """One call of every packed product of a model, with one token."""
    calls = []
    for _, layer in packed_modules(model):
        x = torch.randn(1, layer.in_features, dtype=model.dtype)
        weight = (layer.qweight, layer.scales, layer.zeros, layer.perm, layer.bias)
        calls.append((layer._linear, (x, *weight, layer._segments, layer.out_features, layer.in_features)))

    def run() -> None:
        for call, args in calls:
            call(*args)

    return run


@torch.no_grad()
def measure(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    prompt, tokens = synthetic_tokens(model, 1, args.prompt), synthetic_tokens(model, 1, args.tokens)
    steps: dict[str, Any] = {"eager": EagerSteps(model)}
    alone = products(model)
    first = {"eager": _first(model, steps["eager"], prompt)}
    compile_decoding(model)
    steps["compiled"] = Decoder(model, 1, args.cache)
    first["compiled"] = _first(model, steps["compiled"], prompt)
    start = now(model.device)
    steps["compiled"](tokens[:, :1])
    cold = now(model.device) - start
    torch._dynamo.reset()
    del model._compiled_call  # so that it is compiled once more, with what the first time left on disk
    start = now(model.device)
    steps["compiled"](tokens[:, :1])
    warm = now(model.device) - start
    times: dict[str, list[float]] = {"eager": [], "compiled": [], "products": []}
    for _ in range(args.rounds):
        for name, step in steps.items():
            step.reset()
            times[name].append(statistics.median(_seconds(step, token) for token in tokens.split(1, dim=1)))
        times["products"].append(statistics.median(_seconds(alone) for _ in range(args.tokens)))
    best = {name: 1e3 * min(seconds) for name, seconds in times.items()}
    rest = {name: best[name] - best["products"] for name in steps}
    return {
        "ms_per_token": best,
        "ms_not_products": rest,
        "compiled_over_eager": {"token": best["compiled"] / best["eager"], "rest": rest["compiled"] / rest["eager"]},
        "compile_seconds": cold,
        "compile_seconds_again": warm,
        "first_token_ms": {name: 1e3 * seconds for name, seconds in first.items()},
        "rounds_seconds": times,
    }


def _first(model: Any, steps: Any, prompt: torch.Tensor) -> float:
    """Seconds of the pass over a prompt, which gives the first token: the best of three."""
    found = []
    for _ in range(3):
        steps.reset()
        found.append(_seconds(steps, prompt, logits_to_keep=1))
    return min(found)


def _seconds(run: Callable[..., Any], *args: Any, **words: Any) -> float:
    start = time.perf_counter()
    run(*args, **words)
    return time.perf_counter() - start


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="generated tokens of a round, from an empty cache on")
    parser.add_argument("--cache", type=int, default=CACHE_TOKENS, help="tokens that the compiled step's cache holds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    args.models = args.models.split(",")
    if not set(args.models) <= set(MODELS):
        parser.error(f"--models {','.join(args.models)}: of {', '.join(MODELS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a line for each model, write the JSON."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    names = ("bits", "prompt", "tokens", "cache", "rounds")
    about = facts(torch.device("cpu")) | {name: getattr(args, name) for name in names}
    print(f"{about['processor']}, {about['threads']} threads, load {about['load_average_before']:.2f}")
    print(
        "model          ms a token: eager compiled products | rest: eager compiled | compile s, again | first token ms"
    )
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(scratch) / "inductor")  # nothing is compiled yet
            row = {"model": name} | measure(MODELS[name](Path(scratch), args.bits), args)
        best, rest, first = row["ms_per_token"], row["ms_not_products"], row["first_token_ms"]
        print(
            f"{name:14} {best['eager']:17.2f} {best['compiled']:8.2f} {best['products']:8.2f} | "
            f"{rest['eager']:11.2f} {rest['compiled']:8.2f} | {row['compile_seconds']:9.1f} "
            f"{row['compile_seconds_again']:6.1f} | {first['eager']:7.1f} {first['compiled']:6.1f}",
            flush=True,
        )
        rows.append(row)
        about["load_average_after"] = load_average()
        if args.json:
            args.json.write_text(json.dumps(about | {"results": rows}, indent=1, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
