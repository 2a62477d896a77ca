"""What a Hadamard rotation leaves of ZD, and what it does to the error of low widths.

    python -m benchmarks.reproductions.hadamard_zd MODEL --out results.json

ZD (LWQ, https://arxiv.org/abs/2406.17415) is the part of a layer's weights more than one standard deviation above the
mean; layers with less of it are said to matter more. Rotated weights are near to normal, for which it is 15.87% always.
Weights are rotated along K by random signs and a Hadamard matrix of the largest power of two that divides K, block by
block; "both sides" rotates N in the same way. Errors are relative squared errors of the weights, rtn and hqq, rotated
back or not: a rotation does not change them.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.allocation.reproductions.common import open_results
from mpq_kernels.allocate.study import weight_view
from mpq_kernels.allocate.units import NUMBER, allocated
from mpq_kernels.dense.names import list_linears
from mpq_kernels.format.reference import dequantize
from mpq_kernels.format.weights import QuantizedWeight
from mpq_kernels.quantize import BlockSpec, quantize_block

NORMAL = 0.5 * math.erfc(1 / math.sqrt(2))  # part of a normal variable above one deviation


def rotate(weight: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """[N, K] times random signs and the block-diagonal orthonormal Hadamard matrix, along K; fp32."""
    size = weight.shape[1] & -weight.shape[1]
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (weight.shape[1],), generator=draw) * 2 - 1
    blocks = (weight * signs).view(len(weight), -1, size)
    return (blocks @ (matrix / math.sqrt(size))).reshape(weight.shape)


def zd(weights: torch.Tensor) -> float:
    """Part of the weights more than one standard deviation above the mean."""
    return float(((weights - weights.mean()) / weights.std() > 1).float().mean())


def error(weight: torch.Tensor, bits: int, method: str) -> float:
    """Relative squared error at a width, groups of 64."""
    block = quantize_block(weight, BlockSpec(bits, 64, "int"), method)
    wrong = dequantize(QuantizedWeight.uniform(block)) - weight
    return float(wrong.square().sum() / weight.square().sum())


def spread(found: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Mean and deviation of ZDs, and the deviation that normal weights would show by chance."""
    chance = math.sqrt(statistics.mean(NORMAL * (1 - NORMAL) / sizes[name] for name in found))
    values = list(found.values())
    return {
        "mean": statistics.mean(values), "deviation": statistics.stdev(values), "chance": chance,
        "least": min(values), "largest": max(values),
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    results = open_results(args.out, {"model": args.model.name, "seed": args.seed, "group_size": 64})
    dense = {spec.name: weight_view(model, spec).clone() for spec in allocated(list_linears(model))}
    draw = torch.Generator().manual_seed(args.seed)
    inputs = {name: rotate(weight, draw) for name, weight in dense.items()}
    both = {name: rotate(weight.T, draw).T.contiguous() for name, weight in inputs.items()}
    sizes = {name: weight.numel() for name, weight in dense.items()}
    layers: dict[str, list[str]] = {}
    for name in dense:
        match = NUMBER.fullmatch(name)
        layers.setdefault(match[1] if match else name, []).append(name)
    layer_sizes = {layer: sum(sizes[name] for name in names) for layer, names in layers.items()}
    for word, weights in (("not rotated", dense), ("inputs", inputs), ("both sides", both)):
        by_linear = {name: zd(weight) for name, weight in weights.items()}
        by_layer = {layer: zd(torch.cat([weights[n].flatten() for n in names])) for layer, names in layers.items()}
        point = {"linears": spread(by_linear, sizes), "layers": spread(by_layer, layer_sizes), "by_layer": by_layer}
        for method in ("rtn", "hqq"):
            for bits in (2, 3, 4):
                errors = [error(weight, bits, method) for weight in weights.values()]
                point[f"{method} {bits} bits"] = statistics.mean(errors)
        results.put(word, point)
        for kind in ("linears", "layers"):
            print(word, kind, {key: round(value, 5) for key, value in point[kind].items()})
        print(word, {key: round(value, 5) for key, value in point.items() if "bits" in key}, flush=True)


if __name__ == "__main__":
    main()
