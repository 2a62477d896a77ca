"""Tokens per second of a whole model with synthetic packed weights, and what of a token is not its packed products.

    python benchmarks/models/generation.py --widths 16,8,4,3,2 --activations exact,int8 --json out.json

The model is a Llama of 1.1 billion weights unless --config names another config.json. The last column is the time of a
generated token with the packed layers replaced by ones that return zeros at once: Python, attention, norms, a kept
head, and the calls themselves.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.facts import facts, load_average
from mpq_kernels.backends import ACTIVATIONS
from mpq_kernels.errors import MPQError
from mpq_kernels.evaluate.speed import Measurement, measure, read_bandwidth
from mpq_kernels.evaluate.synthetic import config_linears, synthetic_model
from mpq_kernels.format.codes import KEPT_BITS
from mpq_kernels.nn.linear import packed_modules
from mpq_kernels.plan.plan import Plan

LLAMA_1B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def skip_products(model: Any) -> None:
    """Let every packed layer return zeros of the right shape without reading its weight."""
    for _, layer in packed_modules(model):
        layer._linear = _zeros


def _zeros(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_zeros(*x.shape[:-1], rest[-2])  # (..., segments, out_features, in_features)


def runs(directory: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each width and kind of activations."""
    for bits in args.widths:
        head = KEPT_BITS if bits == KEPT_BITS else (args.head or bits)
        plan = Plan.uniform(config_linears(directory), bits=bits, group_size=args.group, lm_head=head)
        for activations in args.activations if bits != KEPT_BITS else ["exact"]:
            model = synthetic_model(directory, plan, activations=activations)
            for _, layer in packed_modules(model):
                assert layer.activations == activations
            row: dict[str, Any] = {"bits": bits, "head_bits": head, "activations": activations}
            tests = measure(model, args.prompt, args.generate, (1,), args.repetitions)
            row |= {test.name: _numbers(test) for test in tests}
            row["packed_bytes"] = sum(layer.layout.size().total_bytes for _, layer in packed_modules(model))
            if bits != KEPT_BITS:
                skip_products(model)
                tests = measure(model, (), args.generate, (1,), args.repetitions)
                row["ms_without_products"] = {test.name: 1e3 / test.mean for test in tests}
            yield row
            del model
            gc.collect()


def _numbers(test: Measurement) -> dict[str, Any]:
    return {"tokens_per_s": test.mean, "deviation": test.deviation, "best": max(test.rates), "seconds": test.seconds}


def _print(row: dict[str, Any], names: Sequence[str]) -> None:
    cells = [f"{row[name]['tokens_per_s']:8.2f} ±{row[name]['deviation'] or 0:6.2f}" for name in names]
    left = [f"{ms:8.2f}" for ms in row.get("ms_without_products", {}).values()]
    print(f"{row['bits']:4} {row['head_bits']:4} {row['activations']:7}", *cells, *left, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="config.json of another model, or its directory")
    parser.add_argument("--widths", default="16,8,4,3,2", help="16 is the dense model")
    parser.add_argument("--head", type=int, help="bits of lm_head; those of the rest unless told")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--activations", default="exact,int8")
    parser.add_argument("--prompt", type=int, nargs="*", default=[64], help="prompt lengths")
    parser.add_argument("--generate", type=int, nargs="*", default=[24], help="numbers of generated tokens")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    args.widths, args.activations = [int(bits) for bits in args.widths.split(",")], args.activations.split(",")
    if not set(args.activations) <= set(ACTIVATIONS):
        parser.error(f"--activations {','.join(args.activations)}: of {', '.join(ACTIVATIONS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print one line for each model as it comes, write the JSON."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    about = facts(torch.device("cpu")) | {"group_size": args.group, "repetitions": args.repetitions}
    about["read_gbytes_per_s"] = read_bandwidth(torch.device("cpu"))
    names = [f"pp{n}" for n in args.prompt] + [f"tg{n}" for n in args.generate]
    print(f"{about['processor']}, {about['threads']} threads, load {about['load_average_before']:.2f}")
    print("bits head x       ", *(f"{name + ' tokens/s':16}" for name in names), "ms without products")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.config or Path(scratch)
        if args.config is None:
            (directory / "config.json").write_text(json.dumps(LLAMA_1B))
        for row in runs(directory, args):
            rows.append(row)
            _print(row, names)
    about["load_average_after"] = load_average()
    if args.json:
        args.json.write_text(json.dumps(about | {"results": rows}, indent=1, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MPQError as error:
        sys.exit(f"generation.py: {error}")
