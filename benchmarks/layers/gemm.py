"""Single packed linear layers against others, read from memory and not from a cache. Protocol: README.md here.

    python benchmarks/layers/gemm.py --shapes 4096x4096,llama-8b-qkv --widths 2,3,4,8 --tokens 1,16 --json out.json
    python benchmarks/layers/gemm.py --device cuda --budget-s 300 --json out.json --plot out.png

Every line has its own comparison: the time of bf16 for the same shape and tokens in the same run. A layer whose result
is wrong gets no number.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.facts import facts, load_average
from benchmarks.gpu import command
from benchmarks.layers.rows import CPU_HEADS, Row, cpu_line, write_json
from benchmarks.layers.shapes import SHAPES, TOKENS, add_shape, make_layout, parts_of
from benchmarks.layers.timing import TOLERANCE, Call, copies_for, worst_error
from benchmarks.peers.torch import dense_calls, int4_calls, packed_layers
from mpq_kernels.backends import ACTIVATIONS
from mpq_kernels.errors import MPQError
from mpq_kernels.evaluate.speed import read_bandwidth, time_calls
from mpq_kernels.format.codes import KEPT_BITS
from mpq_kernels.format.layout import WeightLayout
from mpq_kernels.nn.linear import MixedLinear

# What is measured where the command line does not say: on the CPU, and on a GPU.
DEFAULTS = {
    "cpu": {
        "shapes": "4096x4096,14336x4096",
        "widths": "1,2,3,4,5,6,7,8",
        "tokens": "1,16",
        "group": 64,
        "seconds": 1.0,
        "total_mb": 200,
    },
    "cuda": {
        "shapes": "8192x8192,llama-8b-token,"
        + ",".join(name for name in SHAPES if name.startswith("llama-") and name not in ("llama-8b-q", "llama-70b-q")),
        "widths": "4,2,3,8,1,5,6,7,4|3|8",
        "tokens": "1,2,4,8,16,32,64,256,1024,4096",
        "group": 128,
        "seconds": 0.02,
        "total_mb": 500,  # ten times the L2 of an H200
    },
}


def packed_calls(layout: WeightLayout, args: argparse.Namespace, copies: int) -> tuple[list[MixedLinear], torch.Tensor]:
    """(a layer for each copy of the weight, W in fp32)."""
    layers = packed_layers(layout, args.device, args.dtype, args.backend, copies)
    return layers, layers[0].dequantize()


@contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    """That of the CPU kernels inside; None for the one that is in use."""
    before = torch.ops.mpq.cpu_isa()
    torch.ops.mpq.set_cpu_isa(name or before)
    try:
        yield
    finally:
        torch.ops.mpq.set_cpu_isa(before)


@dataclass
class Cell:
    """A row and what fills it: calls over the copies of a weight, x, microseconds of each round's calls."""

    row: Row
    calls: list[Call]
    x: torch.Tensor
    isa: str | None = None
    rounds: list[list[float]] = field(default_factory=list)

    def check(self, wanted: torch.Tensor) -> None:
        """Compare the first and the last copy with x @ W.T in fp32; a wrong result has a reason and is not timed."""
        exact = self.x.float() @ wanted.T
        with instruction_set(self.isa):
            self.row.error = worst_error([call(self.x) for call in (self.calls[0], self.calls[-1])], [exact, exact])
        if not self.row.error <= TOLERANCE[self.x.dtype]:  # NaN is not
            self.row.reason = f"wrong by {self.row.error:.2g} of the largest output: not timed"

    def time(self, seconds: float) -> None:
        """One more round."""
        if self.row.reason is None:
            with instruction_set(self.isa):
                self.rounds.append(time_calls([partial(call, self.x) for call in self.calls], self.x.device, seconds))

    def over(self, other: Cell) -> float | None:
        """The median over rounds of the other's median in a round over this one's."""
        medians = [[statistics.median(times) for times in cell.rounds] for cell in (other, self)]
        return statistics.median(a / b for a, b in zip(*medians, strict=True)) if all(medians) else None


def make_cells(shape: str, args: argparse.Namespace) -> Iterator[Cell]:
    """All layers of a shape at every number of tokens, checked, dense ones first."""
    rows, cols = SHAPES[shape]
    dense = torch.randn(sum(rows), cols, device=args.device, generator=torch.Generator(args.device).manual_seed(1))
    dense *= cols**-0.5

    def cells(
        name: str, dtype: torch.dtype, nbytes: int, calls: list[Call], wanted: torch.Tensor, isa: str | None = None
    ) -> Iterator[Cell]:
        for tokens in args.tokens:
            x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(2)).to(args.device, dtype)
            row = Row(shape, tokens, name, str(dtype).removeprefix("torch."), nbytes, len(calls))
            cell = Cell(row, calls, x, isa)
            cell.check(wanted)
            yield cell

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        weight = dense.to(dtype)
        copies = copies_for(weight.nbytes, args.total_mb, 2)
        yield from cells(name, dtype, weight.nbytes, dense_calls(weight, copies), weight.float())
    if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        nbytes = dense.numel() // 2 + dense.numel() // args.group * 4
        calls, wanted = int4_calls(dense, args.group, copies_for(nbytes, args.total_mb, 2))
        yield from cells("torch int4", torch.bfloat16, nbytes, calls, wanted)
    del dense
    for width in args.widths:
        layout = make_layout(shape, width, args.group)
        if layout is not None:
            nbytes = layout.size().total_bytes
            layers, wanted = packed_calls(layout, args, copies_for(nbytes, args.total_mb, 2))
            for activations in args.activations:
                # Both modes over the same tensors: the modules are copied, their buffers are not.
                views = [copy.copy(layer) for layer in layers]
                for view in views:
                    view.set_activations(activations)
                name = f"packed {width}" if activations == "exact" else f"packed {width} {activations}"
                for isa in args.isas:
                    yield from cells(f"{name} {isa}" if isa else name, args.dtype, nbytes, list(views), wanted, isa)


def run_shape(shape: str, args: argparse.Namespace) -> list[Row]:
    """All layers of a shape, timed in turns: a minute in which the machine is slower is one for all of them."""
    cells = list(make_cells(shape, args))
    for _ in range(args.rounds):
        for cell in cells:
            cell.time(args.seconds / args.rounds)
    bases = {cell.row.tokens: cell for cell in cells if cell.row.layer == "bf16"}
    for cell in cells:
        if cell.rounds:
            cell.row.set_times([us for times in cell.rounds for us in times], args.bandwidth)
            cell.row.over_bf16 = cell.over(bases[cell.row.tokens])
    return [cell.row for cell in cells]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", help="of " + ", ".join([*SHAPES, *TOKENS]) + ", or NxK")
    parser.add_argument("--widths", help='bits, or one for each member: "4|3|8"')
    parser.add_argument("--tokens", help="M: rows of x")
    parser.add_argument("--group", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of packed's x")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument(
        "--backend", help="of packed layers; without it the first that serves, on CUDA each of cuda,triton that works"
    )
    parser.add_argument("--activations", default="exact", help="of packed layers: exact, int8, or both (exact,int8)")
    parser.add_argument("--isas", help="of packed layers on the CPU, a row for each, such as avx512vnni,amx")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--total-mb", type=float, help="copies of a weight take more than this: 200, on CUDA 500")
    parser.add_argument("--seconds", type=float, help="time for each number; on CUDA for each of its two timings")
    parser.add_argument("--rounds", type=int, default=5, help="turns that make up the time of a number (CPU)")
    parser.add_argument("--json", type=Path, help="file to write; on CUDA again after every layer")
    command.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.device.type not in DEFAULTS:
        parser.error(f"--device {args.device}: cpu or cuda")
    for name, value in DEFAULTS[args.device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.shapes, args.widths = args.shapes.split(","), args.widths.split(",")
    for shape in args.shapes:
        if not add_shape(shape) or (shape in TOKENS and args.device.type == "cpu"):
            parser.error(f"--shapes {shape}: not in the table of {args.device.type}, and not of the form NxK")
        for part in parts_of(shape):
            if SHAPES[part][1] % args.group:
                parser.error(f"--group {args.group} does not divide K={SHAPES[part][1]} of {part}")
    bits = [part for width in args.widths for part in width.split("|")]
    if not all(part.isdigit() and 1 <= int(part) <= 8 for part in bits):
        parser.error(f"--widths: 1 to 8, not {','.join(args.widths)} ({KEPT_BITS} bits are always measured)")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1")
    args.activations = args.activations.split(",")
    if not set(args.activations) <= set(ACTIVATIONS):
        parser.error(f"--activations {','.join(args.activations)}: of {', '.join(ACTIVATIONS)}")
    if args.activations != ["exact"] and (args.device.type != "cpu" or args.dry_run):
        parser.error("--activations int8 is measured on the CPU, the only device that has it")
    args.isas = args.isas.split(",") if args.isas else [None]
    if args.isas != [None] and (args.device.type != "cpu" or args.dry_run):
        parser.error("--isas are instruction sets of the CPU")
    for name in filter(None, args.isas):
        try:
            refusal = torch.ops.mpq.cpu_isa_refusal(name)
        except RuntimeError as error:
            parser.error(f"--isas: {error}")
        if refusal:
            parser.error(f"--isas {name}: {refusal}")
    args.tokens = [int(part) for part in args.tokens.split(",")]
    args.dtype = getattr(torch, args.dtype)
    return args


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print one line for each number, shape by shape, write the JSON. 1 when a result was wrong."""
    started = time.monotonic()
    args = parse(argv)
    if args.device.type == "cuda" or args.dry_run:
        return command.main(args, list(sys.argv[1:] if argv is None else argv), started)
    if args.threads:
        torch.set_num_threads(args.threads)
    about = facts(args.device) | {
        "group_size": args.group, "total_mb": args.total_mb, "seconds_per_cell": args.seconds,
        "rounds": args.rounds,
    }  # fmt: skip
    args.bandwidth = about["read_gbytes_per_s"] = read_bandwidth(args.device)
    print(
        f"{about['processor']}, {about['threads']} threads, reads {args.bandwidth:.1f} GB/s, commit {about['commit']}"
    )
    print(f"{'shape':18} {'M':>4} {'layer':24} {'x':9} {CPU_HEADS}")
    results = []
    for shape in args.shapes:
        for row in run_shape(shape, args):
            results.append(row)
            print(cpu_line(row), flush=True)
    about["load_average_after"] = load_average()
    write_json(args.json, about, results)
    return int(any(row.reason for row in results))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MPQError as error:
        sys.exit(f"gemm.py: {error}")
