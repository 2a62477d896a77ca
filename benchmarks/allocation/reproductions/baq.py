"""Bits for single columns (BAQ) against GPTQ, at equal nominal bits and at equal stored bytes.

    python -m benchmarks.reproductions.baq MODEL --text FILE --calibration FILE --out results.json

Claim (BAQ, https://arxiv.org/abs/2506.05664): GPTQ with R_j = R0 + 1/2 log2(c_j / geometric mean) bits for column j,
c_j its loss in a first pass at R0, loses less than GPTQ at R0 bits. Column j has a whole number of levels between the
least and the largest weight of its row; "bits" are the mean of log2(levels): nominal, since such codes are not stored.

    gptq            R0 bits, one range a row, no groups                                            nominal
    baq             levels as published (exponent 1.95, gain factor); their mean is not held to R0 nominal
    baq at R0       the same levels scaled until their mean is R0 in every linear                  nominal
    baq stored      columns sorted by R_j, 64 to a supertile, each with its rounded mean R_j: 1 to 8 bits, permutation,
                    a scale and a zero for each row and width, quantized by the package's GPTQ     bytes
    baq stored up   the same with the largest R_j of a supertile, rounded up: no level is lost     bytes
    gptq gN         the package's GPTQ, uniform, groups of N                                       bytes

Hessians come from the dense model for all linears at once, 1% damping.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

from benchmarks.allocation.reproductions.common import Experiment, compare, parser
from mpq_kernels.calibrate.hessians import damped
from mpq_kernels.format.layout import Segment, WeightLayout
from mpq_kernels.format.reference import dequantize
from mpq_kernels.quantize.gptq import inverse_factor, quantize_with_hessian

EXPONENT = 1.95  # of the published code, where the closed form has 2
TILE = 64


def by_levels(weight: torch.Tensor, factor: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [N, K], column losses [K]) of GPTQ with a number of levels for each column; one level: zero."""
    work, out = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    low, high = work.amin(1).clamp(max=0), work.amax(1).clamp(min=0)
    losses = torch.zeros(weight.shape[1], dtype=torch.float64)
    for j, count in enumerate(levels.tolist()):
        if count > 1:
            step = ((high - low) / (count - 1)).clamp(min=1e-12)
            zero = (-low / step).round()
            out[:, j] = ((work[:, j] / step).round() + zero).clamp(0, count - 1).sub(zero) * step
        error = (work[:, j] - out[:, j]) / factor[j, j]
        work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
        losses[j] = error.square().sum() / 2
    return out.float(), losses


def published(losses: torch.Tensor, bits: float) -> torch.Tensor:
    """Levels before they are rounded, fp64 [K]."""
    losses = losses.clamp(min=1e-30)
    gain = losses.log().mean().exp() / losses.mean()
    return (losses / (gain * losses.mean()) * 2 ** (EXPONENT * bits)).pow(1 / EXPONENT)


def whole(levels: torch.Tensor) -> torch.Tensor:
    """Numbers of levels, at least 1."""
    return levels.clamp(min=1).round()


def scaled(levels: torch.Tensor, bits: float) -> torch.Tensor:
    """Whole levels times a common factor, the largest for which the mean of log2 is at most `bits`."""
    low, high = 0.0, 16.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(whole(levels * middle).log2().mean()) <= bits else (low, middle)
    return whole(levels * low)


def stored_layout(levels: torch.Tensor, rows: int, up: bool) -> tuple[WeightLayout, torch.Tensor]:
    """Layout and permutation that store BAQ's widths: supertiles of sorted columns."""
    bits = levels.clamp(min=1).log2()
    perm = bits.argsort(descending=True, stable=True)
    tiles = [tile.max().ceil() if up else tile.mean().round() for tile in bits[perm].split(TILE)]
    widths = [min(8, max(1, int(value))) for value in tiles]
    segments, start = [], 0
    for width, run in itertools.groupby(widths):
        end = min(start + TILE * len(list(run)), len(bits))
        segments.append(Segment(0, rows, start, end, width, end - start, "none" if width == 1 else "int"))
        start = end
    return WeightLayout(rows, len(bits), tuple(segments), "float16", True), perm.int()


def main() -> None:
    """Measure what is missing, print the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--bits", default="2,3")
    arguments.add_argument("--group-sizes", default="-1,128,64,32")
    args = arguments.parse_args()
    experiment = Experiment(args, bits=args.bits, group_sizes=args.group_sizes, damping=0.01)
    study = experiment.study
    factors, hessians = {}, {}
    for name, weight in study.dense.items():
        hessians[name] = damped(study.inputs.moments[name].clone(), 0.01).double()
        factors[name] = inverse_factor(hessians[name], weight.shape[1], None, name).double()

    def nominal(name: str, levels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {key: by_levels(weight, factors[key], levels[key]) for key, weight in study.dense.items()}
        total = sum(float(levels[key].log2().mean()) * weight.numel() for key, weight in study.dense.items())
        point = experiment.point(name, {key: values for key, (values, _) in found.items()})
        point["nominal_bits"] = total / experiment.weights
        experiment.results.put(name, point)
        return {key: losses for key, (_, losses) in found.items()}

    def packed(name: str, layout_of: Callable[[str, torch.Tensor], tuple[WeightLayout, torch.Tensor | None]]) -> None:
        values, size, permutations = {}, 0, 0
        for key, weight in study.dense.items():
            layout, perm = layout_of(key, weight)
            values[key] = dequantize(quantize_with_hessian(weight, layout, perm, hessians[key], key))
            size += layout.size().total_bytes
            permutations += layout.size().metadata
        point = experiment.point(name, values, size)
        point["permutation_bpw"] = permutations / experiment.weights
        experiment.results.put(name, point)

    for bits in [int(value) for value in args.bits.split(",")]:
        losses = nominal(f"{bits} gptq", {k: torch.full((w.shape[1],), 2.0**bits) for k, w in study.dense.items()})
        raw = {key: published(loss, bits) for key, loss in losses.items()}
        nominal(f"{bits} baq", {key: whole(levels) for key, levels in raw.items()})
        nominal(f"{bits} baq at R0", {key: scaled(levels, bits) for key, levels in raw.items()})
        packed(f"{bits} baq stored", lambda k, w, raw=raw: stored_layout(raw[k], len(w), False))  # type: ignore[misc]
        packed(f"{bits} baq stored up", lambda k, w, raw=raw: stored_layout(raw[k], len(w), True))  # type: ignore[misc]
        for width, size in itertools.product((bits, bits + 1), [int(value) for value in args.group_sizes.split(",")]):
            if all(size == -1 or weight.shape[1] % size == 0 for weight in study.dense.values()):
                packed(
                    f"{width} gptq g{'K' if size == -1 else size}",
                    lambda k, w, width=width, size=size: (WeightLayout.uniform(*w.shape, width, size, "int"), None),  # type: ignore[misc]
                )
        base = experiment.results.get(f"{bits} gptq")
        for name in (f"{bits} baq", f"{bits} baq at R0"):
            point = experiment.results.get(name)
            assert math.isfinite(point["ppl"])
            print(f"{name}: {point['nominal_bits']:.3f} nominal bits, {compare(point, base)} against gptq", flush=True)


if __name__ == "__main__":
    main()
