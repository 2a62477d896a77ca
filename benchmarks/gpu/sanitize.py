"""Small packed linears through `torch.ops.mpq.linear`, for compute-sanitizer: little work, every kind of path.

    compute-sanitizer --tool racecheck --error-exitcode 9 python benchmarks/gpu/sanitize.py
    python benchmarks/gpu/sanitize.py --device cpu

Every width at M = 1, 9 and 33, a K that is long for its N (so that K is split between blocks), rows that do not fill a
supertile, row bands and column segments of different widths, a permutation of K, a bias. Weights and x are made on the
CPU, so that few kernels of torch run under the tool; results are compared with the reference in fp64.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.layers.timing import TOLERANCE
from mpq_kernels.backends import ops  # noqa: F401  (ops registers the operators)
from mpq_kernels.format import reference  # noqa: F401  (ops registers the operators)
from mpq_kernels.format.layout import Segment, WeightLayout
from mpq_kernels.format.random import random_weight

TOKENS = (1, 9, 33)
MIXED = (
    Segment(0, 70, 0, 128, 3, 64, "int"),
    Segment(0, 70, 128, 576, 8, 32, "int"),
    Segment(70, 134, 0, 576, 2, 64, "int"),
    Segment(134, 200, 0, 64, 5, 64, "int"),
    Segment(134, 200, 64, 192, 1, 128, "int"),
    Segment(134, 200, 192, 576, 6, 64, "int"),
    Segment(200, 201, 0, 576, 7, 576, "none"),
    Segment(201, 265, 0, 576, 4, 64, "int"),
)


def layouts() -> Iterator[tuple[str, WeightLayout]]:
    """(name, layout) of every case."""
    for bits in range(1, 9):
        yield f"{bits} bits, long K", WeightLayout.uniform(72, 2048, bits, 64, "int")
    for bits, zero in itertools.product((3, 4), ("none", "float", "min")):
        yield f"{bits} bits, zero {zero}", WeightLayout.uniform(128, 256, bits, 32, zero)
    yield "fused 4|3|8", WeightLayout(
        320, 1024,
        tuple(
            Segment(n0, n1, 0, 1024, bits, 128, "int") for n0, n1, bits in ((0, 192, 4), (192, 256, 3), (256, 320, 8))
        ),
    )  # fmt: skip
    yield "segments", WeightLayout(265, 576, MIXED)
    yield "segments, permuted", WeightLayout(265, 576, MIXED, permuted=True)


def run(name: str, layout: WeightLayout, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Error of one case, over the largest output."""
    weight = random_weight(layout, "cpu", torch.Generator().manual_seed(len(name)))
    x = torch.randn(tokens, layout.in_features, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    bias = torch.linspace(-1, 1, layout.out_features).to(dtype) if tokens == 9 else None
    exact = reference.linear(x, weight, bias)
    moved = weight.to(device)
    tensors = (moved.qweight, moved.scales, moved.zeros, moved.perm, None if bias is None else bias.to(device))
    shape = (layout.segment_ints(), layout.out_features, layout.in_features)
    y = torch.ops.mpq.linear(x.to(device), *tensors, *shape).cpu()
    return float((y.double() - exact).abs().max() / exact.abs().max())


def main() -> int:
    """All cases within the time; 1 when one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--budget-s", type=float, default=60, help="start no case after so many seconds")
    args = parser.parse_args()
    key = args.device.type.upper()
    if not torch._C._dispatch_has_kernel_for_dispatch_key("mpq::linear", key):
        print(f"this build has no kernels for {args.device.type}: nothing to check")
        return 0
    end, done, wrong = time.monotonic() + args.budget_s, 0, 0
    cases = list(itertools.product(TOKENS, layouts(), (torch.bfloat16, torch.float16)))
    for tokens, (name, layout), dtype in cases:
        if time.monotonic() > end:
            break
        error = run(name, layout, tokens, dtype, args.device)
        done += 1
        if not error <= TOLERANCE[dtype]:  # NaN is not
            wrong += 1
            print(f"WRONG by {error:.2g}: {name}, M={tokens}, {dtype}", flush=True)
    print(f"{done} of {len(cases)} cases run, {wrong} wrong")
    return int(wrong > 0 or done == 0)


if __name__ == "__main__":
    sys.exit(main())
