"""Single packed linear layers against torch's own, read from memory and not from a cache. Protocol: README.md here.

    python benchmarks/gemm.py --shapes 4096x4096,llama-8b-qkv --widths 2,3,4,8 --tokens 1,16 --json out.json

Every line has its own comparison: the time of bf16 for the same shape and tokens in the same run. A layer whose result
is wrong gets no number.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mpq_kernels import MixedLinear
from mpq_kernels.benchmark import read_bandwidth, time_calls
from mpq_kernels.errors import MPQError
from mpq_kernels.formats import KEPT_BITS
from mpq_kernels.layout import WeightLayout
from mpq_kernels.resolve import stack_layouts
from mpq_kernels.synthetic import random_weight
from mpq_kernels.version import VERSION

# Name -> (rows of each member, K). A fused weight has several members; its width may be written "4|3|8".
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "4096x4096": ((4096,), 4096),
    "14336x4096": ((14336,), 4096),
    "8192x8192": ((8192,), 8192),
    "llama-8b-q": ((4096,), 4096),
    "llama-8b-k": ((1024,), 4096),
    "llama-8b-qkv": ((4096, 1024, 1024), 4096),
    "llama-8b-gate": ((14336,), 4096),
    "llama-8b-gate-up": ((14336, 14336), 4096),
    "llama-8b-down": ((4096,), 14336),
    "llama-70b-qkv": ((8192, 1024, 1024), 8192),
    "llama-70b-o": ((8192,), 8192),
    "llama-70b-gate-up": ((28672, 28672), 8192),
    "llama-70b-down": ((8192,), 28672),
}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the largest output; see README.md
Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Row:
    """One layer at one number of tokens. us: microseconds of a call. over_bf16: bf16's median / this median."""

    shape: str
    tokens: int
    layer: str
    dtype: str
    weight_bytes: int
    copies: int
    calls: int = 0
    us_median: float | None = None
    us_min: float | None = None
    gbytes_per_s: float | None = None
    of_bandwidth: float | None = None
    over_bf16: float | None = None
    error: float | None = None
    reason: str | None = None


def make_layout(shape: str, width: str, group: int) -> WeightLayout | None:
    """Layout of a shape in one width ("4") or one for each member ("4|3|8"); None where the members are not as many."""
    rows, cols = SHAPES[shape]
    bits = [int(part) for part in width.split("|")]
    if len(bits) not in (1, len(rows)):
        return None
    bits = bits * len(rows) if len(bits) == 1 else bits
    return stack_layouts([WeightLayout.uniform(n, cols, b, group, "int") for n, b in zip(rows, bits, strict=True)])


def packed_calls(layout: WeightLayout, args: argparse.Namespace, copies: int) -> tuple[list[Call], torch.Tensor]:
    """(a layer for each copy of the weight, W in fp32)."""
    generator = torch.Generator(args.device).manual_seed(0)
    weight = random_weight(layout, args.device, generator)
    layers = [MixedLinear.from_packed(weight, None, args.dtype, args.backend)]
    for _ in range(copies - 1):
        clone = type(weight)(layout, *(None if t is None else t.clone() for t in _tensors(weight)))
        layers.append(MixedLinear.from_packed(clone, None, args.dtype, args.backend))
    return list(layers), layers[0].dequantize()


def _tensors(weight: Any) -> tuple[torch.Tensor | None, ...]:
    return weight.qweight, weight.scales, weight.zeros, weight.perm


def dense_calls(weight: torch.Tensor, copies: int) -> list[Call]:
    """torch.nn.functional.linear over copies of a dense weight."""

    def call(copy: torch.Tensor) -> Call:
        return lambda x: torch.nn.functional.linear(x, copy)

    return [call(weight.clone()) for _ in range(copies)]


def int4_calls(dense: torch.Tensor, group: int, copies: int) -> tuple[list[Call], torch.Tensor]:
    """(torch's int4 CPU operator over copies, the W it means) for codes made from a dense weight [N, K]."""
    rows, cols = dense.shape
    grouped = dense.view(rows, cols // group, group)
    scale = (grouped.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-8).bfloat16().float()
    codes = (grouped / scale + 8).round_().clamp_(0, 15)
    wanted = ((codes - 8) * scale).view(rows, cols)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(rows, cols).int(), 1)
    table = torch.stack((scale, torch.zeros_like(scale)), -1).view(rows, cols // group, 2)
    table = table.transpose(0, 1).contiguous().bfloat16()

    def call(copy: torch.Tensor) -> Call:
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, copy, group, table)

    return [call(packed.clone()) for _ in range(copies)], wanted


def measure(row: Row, calls: list[Call], x: torch.Tensor, wanted: torch.Tensor, args: argparse.Namespace) -> Row:
    """Check the first and the last copy against x @ W.T in fp32, then time; a wrong result leaves the row empty."""
    exact = x.float() @ wanted.T
    results = [call(x).float() for call in (calls[0], calls[-1])]
    row.error = max(float((y - exact).abs().max() / exact.abs().max()) for y in results)
    if not row.error <= TOLERANCE[x.dtype]:  # NaN is not
        row.reason = f"wrong by {row.error:.2g} of the largest output: not timed"
        return row
    times = time_calls([lambda call=call: call(x) for call in calls], x.device, args.seconds)
    row.calls, row.us_median, row.us_min = len(times), statistics.median(times), min(times)
    row.gbytes_per_s = row.weight_bytes / row.us_median / 1e3
    row.of_bandwidth = row.gbytes_per_s / args.bandwidth
    return row


def run_shape(shape: str, args: argparse.Namespace) -> Iterator[Row]:
    """All layers of a shape, dense ones first; one weight lives at a time."""
    rows, cols = SHAPES[shape]
    dense = torch.randn(sum(rows), cols, device=args.device, generator=torch.Generator(args.device).manual_seed(1))
    dense *= cols**-0.5
    bf16: dict[int, float | None] = {}

    def cells(name: str, dtype: torch.dtype, nbytes: int, calls: list[Call], wanted: torch.Tensor) -> Iterator[Row]:
        for tokens in args.tokens:
            x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(2)).to(args.device, dtype)
            row = Row(shape, tokens, name, str(dtype).removeprefix("torch."), nbytes, len(calls))
            measure(row, calls, x, wanted, args)
            if name == "bf16":
                bf16[tokens] = row.us_median
            base = bf16.get(tokens)
            row.over_bf16 = base / row.us_median if base and row.us_median else None
            yield row

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        weight = dense.to(dtype)
        yield from cells(name, dtype, weight.nbytes, dense_calls(weight, copies(weight.nbytes, args)), weight.float())
    if args.device.type == "cpu" and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        nbytes = dense.numel() // 2 + dense.numel() // args.group * 4
        calls, wanted = int4_calls(dense, args.group, copies(nbytes, args))
        yield from cells("torch int4", torch.bfloat16, nbytes, calls, wanted)
    del dense
    for width in args.widths:
        layout = make_layout(shape, width, args.group)
        if layout is not None:
            nbytes = layout.size().total_bytes
            calls, wanted = packed_calls(layout, args, copies(nbytes, args))
            yield from cells(f"packed {width}", args.dtype, nbytes, calls, wanted)


def copies(nbytes: int, args: argparse.Namespace) -> int:
    """How many copies of a weight of so many bytes exceed --total-mb, two at least."""
    return max(2, int(args.total_mb * 1e6) // nbytes + 1)


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    from mpq_kernels.cli.doctor import examine

    state = examine()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": str(args.device),
        "gpus": state["gpus"]["devices"],
        "processor": state["machine"]["processor"],
        "system": platform.system() + " " + platform.release(),
        "threads": torch.get_num_threads(),
        "isa": state["compiled"]["operators"]["isa"],
        "load_average_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "packages": state["packages"],
        "mpq_kernels": VERSION,
        "commit": commit.stdout.strip() or None,
        "group_size": args.group,
        "total_mb": args.total_mb,
        "seconds_per_cell": args.seconds,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,14336x4096", help="of " + ", ".join(SHAPES) + ", or NxK")
    parser.add_argument("--widths", default="1,2,3,4,5,6,7,8", help='bits, or one for each member: "4|3|8"')
    parser.add_argument("--tokens", default="1,16", help="M: rows of x")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of packed's x")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--backend", help="backend of the packed layers; the first that serves without it")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--total-mb", type=float, default=200, help="bytes of all copies of a weight exceed this")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each number")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args(argv)
    args.shapes, args.widths = args.shapes.split(","), args.widths.split(",")
    for shape in args.shapes:
        rows, _, cols = shape.partition("x")
        if shape not in SHAPES:
            if not (rows.isdigit() and cols.isdigit() and int(rows) * int(cols)):
                parser.error(f"--shapes {shape}: not in the table, and not of the form NxK")
            SHAPES[shape] = ((int(rows),), int(cols))
        if SHAPES[shape][1] % args.group:
            parser.error(f"--group {args.group} does not divide K={SHAPES[shape][1]} of {shape}")
    bits = [part for width in args.widths for part in width.split("|")]
    if not all(part.isdigit() and 1 <= int(part) <= 8 for part in bits):
        parser.error(f"--widths: 1 to 8, not {','.join(args.widths)} ({KEPT_BITS} bits are always measured)")
    args.tokens = [int(part) for part in args.tokens.split(",")]
    args.dtype = getattr(torch, args.dtype)
    return args


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print one line for each number as it comes, write the JSON."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    about = facts(args)
    args.bandwidth = about["read_gbytes_per_s"] = read_bandwidth(args.device)
    print(
        f"{about['processor']}, {about['threads']} threads, reads {args.bandwidth:.1f} GB/s, commit {about['commit']}"
    )
    heads = f"{'median us':>10} {'min us':>10} {'GB/s':>6} {'of max':>6} {'bf16 /':>7}"
    print(f"{'shape':18} {'M':>4} {'layer':14} {'x':9} {heads}")
    results = []
    for shape in args.shapes:
        for row in run_shape(shape, args):
            results.append(asdict(row))
            print(f"{row.shape:18} {row.tokens:4} {row.layer:14} {row.dtype:9}", _numbers(row), flush=True)
    about["load_average_after"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    return int(any(row["reason"] for row in results))


def _numbers(row: Row) -> str:
    if row.us_median is None:
        return row.reason or ""
    ratio = "" if row.over_bf16 is None else f"{row.over_bf16:6.2f}x"
    return f"{row.us_median:10.1f} {row.us_min:10.1f} {row.gbytes_per_s:6.1f} {row.of_bandwidth:6.0%} {ratio}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MPQError as error:
        sys.exit(f"gemm.py: {error}")
