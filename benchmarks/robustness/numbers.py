"""Numbers at the edges: Inf, NaN, subnormal and huge inputs and scales, one outlier, constant weights, small shapes.

What must come out, for every width, kind of zeros, dtype and instruction set (docs/robustness.md):

    x without Inf and NaN, below SAFE      within the derived bound of the product in fp64, and what subnormals lose
    x beyond SAFE, or scales               that, or Inf or NaN, where sums leave fp32; never another finite number
    a row of x with Inf or NaN             no finite number in the row of y; other rows are not touched
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch

import mpq_kernels.backends.ops  # noqa: F401  (registers the operators)
from mpq_kernels.format import reference, reference_int8
from mpq_kernels.format.kinds import KINDS, ZERO_KINDS
from mpq_kernels.format.weights import TORCH_DTYPES, QuantizedBlock, QuantizedWeight
from mpq_kernels.format.words import pack_weight

from .campaign import Run
from .operators import FLOATS, ISAS

SAFE = 2.0**100  # sums of products with codes of 8 bits and scales below 2**7 stay far inside fp32
SCALES = ("normal", "normal", "small", "subnormal", "zero", "huge", "signs")
XS = ("normal", "outlier", "zeros", "subnormal", "huge", "inf", "nan", "mixed", "one")
CODES = ("any", "any", "zeros", "ones", "zero point", "rows")


def make_weight(chance: Random, generator: torch.Generator) -> tuple[QuantizedWeight, str]:
    """A weight of one block, and how its scales were chosen."""
    bits, n, k = (
        chance.randint(1, 8),
        chance.choice((1, 1, 2, 64, 65, 130)),
        chance.choice((1, 1, 2, 63, 64, 65, 128, 320)),
    )
    group = chance.choice([g for g in range(1, k + 1) if k % g == 0])
    top, shape = (1 << bits) - 1, (n, k // group)
    dtype = TORCH_DTYPES[chance.choice(("float16", "bfloat16", "float32"))]
    info, how = torch.finfo(dtype), chance.choice(SCALES)
    scales = torch.rand(shape, generator=generator) + 0.5
    scales = {
        "small": scales * float(info.smallest_normal),
        "subnormal": scales * float(info.smallest_normal) / 8,
        "zero": scales * 0,
        "huge": scales * 0 + info.max / (1 << bits if dtype != torch.float16 else 1),
        "signs": torch.where(torch.rand(shape, generator=generator) < 0.5, -scales, scales),
    }.get(how, scales)
    kind, zeros = chance.choice(ZERO_KINDS), None
    if kind == "int":
        zeros = torch.randint(0, chance.choice((top + 1, 256)), shape, generator=generator).to(torch.uint8)
    elif kind == "float":
        zeros = (torch.rand(shape, generator=generator) * top).to(dtype)
    elif kind == "min":
        low = torch.rand(shape, generator=generator) * top * -scales
        zeros = low.clamp(-info.max, info.max).to(dtype)
    codes = torch.randint(0, top + 1, (n, k), dtype=torch.uint8, generator=generator)
    filling = chance.choice(CODES)
    if filling == "zero point":  # every weight is 0, where the zero point is a code
        zero = torch.zeros(shape) + KINDS[kind].zero(bits, zeros)
        zero = (-zero / scales if kind == "min" else zero).nan_to_num().round()
        codes = zero.clamp(0, top).to(torch.uint8).repeat_interleave(group, 1)
    elif filling in ("zeros", "ones"):
        codes = torch.full_like(codes, 0 if filling == "zeros" else top)
    elif filling == "rows":
        codes = codes[:, :1].expand(n, k).contiguous()
    perm = torch.randperm(k, generator=generator).int() if chance.random() < 0.3 else None
    return QuantizedWeight.uniform(QuantizedBlock(bits, codes, scales.to(dtype), zeros, kind), perm), how


def make_x(chance: Random, generator: torch.Generator, k: int) -> torch.Tensor:
    """x [M, K] of one kind."""
    m = chance.choice((1, 1, 2, 3, 4, 5, 17, 33, 65, 4096 if k <= 65 and chance.random() < 0.2 else 7))
    dtype = chance.choice(FLOATS)
    info, how = torch.finfo(dtype), chance.choice(XS)
    x = torch.randn((m, k), generator=generator)
    row, column = chance.randrange(m), chance.randrange(k)
    if how == "zeros":
        x = x * 0 * -1
    elif how == "subnormal":
        x = x * float(info.smallest_normal) / 4
    elif how == "huge":
        x = x.sign() * info.max * chance.choice((1.0, 0.5, 2.0**-20))
    elif how == "one":
        x = torch.zeros(m, k)
        x[:, column] = 1
    values = {"outlier": (info.max / 2, 1e4), "inf": (float("inf"), -float("inf")), "nan": (float("nan"),)}
    for kind in ("outlier", "inf", "nan") if how == "mixed" else (how,):
        if kind in values:
            x[row, column] = chance.choice(values[kind])
            row, column = chance.randrange(m), chance.randrange(k)
    return x.to(dtype)


def underflow(x: torch.Tensor, weight: QuantizedWeight, int8: bool) -> float:
    """What operations below fp32's normal numbers may lose, which the bounds leave out: half of 2**-149 each.

    That is multiplied by what follows: a scale, or x, or with int8 activations the sum of products of codes.
    """
    factors = [1.0, float(x.abs().max()), *(float(block.scales.abs().max()) for _, _, block in weight.blocks)]
    return (weight.layout.in_features + 6) * 2.0**-149 * max(factors) * (255 * 127 if int8 else 1)


def check(x: torch.Tensor, weight: QuantizedWeight, y: torch.Tensor, int8: bool, plain: bool) -> str:
    """AssertionError unless y is as the module's text says. plain: no scale is huge."""
    module = reference_int8 if int8 else reference
    whole = torch.isfinite(x).all(1)
    assert not bool(torch.isfinite(y[~whole]).any()), "a finite number from a row with Inf or NaN"
    part, got = x[whole], y[whole].double()
    if not len(part):
        return "not finite"
    wanted = (module.linear_int8 if int8 else module.linear)(part, weight)
    bound = (module.accumulation_bound if int8 else module.error_bound)(part, weight) + underflow(part, weight, int8)
    largest = float(torch.finfo(x.dtype).max)
    good = (got - wanted).abs() <= bound
    good |= (wanted.abs() + bound > largest) & (got.abs() >= largest * (1 - 2.0**-7))  # rounds to Inf, or nearly
    safe = plain and float(part.abs().max()) < SAFE
    assert bool((good if safe else good | ~torch.isfinite(got)).all()), (
        f"off: {got[~good][:3]}, not {wanted[~good][:3]}"
    )
    dense = torch.nn.functional.linear(part.double(), reference.dequantize(weight, torch.float64))
    if not int8 and safe:
        assert bool((((got - dense).abs() <= bound) | ~torch.isfinite(got)).all()), "differs from a dense product"
    return "exact" if bool(good.all()) else "overflowed"


def prepare(folder: Path) -> Run:
    """Cases: one product on one instruction set, exact or with int8 activations."""
    torch.utils.deterministic.fill_uninitialized_memory = True

    def run(chance: Random) -> str:
        torch.ops.mpq.set_cpu_isa(chance.choice(ISAS))
        generator = torch.Generator().manual_seed(chance.randrange(2**31))
        weight, scales = make_weight(chance, generator)
        x = make_x(chance, generator, weight.layout.in_features)
        packed, layout, int8 = pack_weight(weight), weight.layout, chance.random() < 0.3
        operator = torch.ops.mpq.linear_int8 if int8 else torch.ops.mpq.linear
        table = (layout.segment_ints(), layout.out_features, layout.in_features)
        y = operator(x, packed.qweight, packed.scales, packed.zeros, packed.perm, None, *table)
        assert y.shape == (len(x), layout.out_features) and y.dtype == x.dtype
        return check(x, weight, y, int8, scales != "huge")

    return run
