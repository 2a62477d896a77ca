"""bf16 activations of few tokens on the CPU, which some instruction sets multiply in pairs: every bit of the fp32 sums.

y is rounded to bf16, which hides most of a sum. Products with a one-hot x are therefore taken three times, each time
with a bias that takes off what is known already: the differences are exact in fp32, and three times 8 bits are all.
"""

import pytest
import torch
from cases import BITS, mixed_weight, random_weight, support_matrix

from mpq_kernels import packing, reference
from mpq_kernels.weights import PackedWeight

TOKENS = (1, 2, 3, 4)


def linear(x, packed: PackedWeight, bias=None):
    layout = packed.layout
    weight = (packed.qweight, packed.scales, packed.zeros, packed.perm)
    return torch.ops.mpq.linear(x, *weight, bias, layout.segment_ints(), layout.out_features, layout.in_features)


def fp32_columns(packed: PackedWeight, columns: list[int]) -> torch.Tensor:
    """Columns [tokens, N] of the weight in fp32, out of products with a one-hot bf16 x of as many tokens."""
    x = torch.zeros(len(columns), packed.layout.in_features, dtype=torch.bfloat16)
    x[torch.arange(len(columns)), torch.tensor(columns)] = 1.0
    known = torch.zeros(len(columns), packed.layout.out_features)
    for _ in range(3):
        step = torch.stack([linear(x, packed, -known[m])[m] for m in range(len(columns))])
        known = known + step.float()
    return known


def check_one_hot(packed: PackedWeight, columns) -> None:
    dense = reference.dequantize(packed)
    for tokens in TOKENS:
        for i in range(0, len(columns) - tokens + 1, tokens * len(TOKENS)):
            picked = columns[i : i + tokens]
            assert torch.equal(fp32_columns(packed, picked), dense[:, picked].T), picked


def check_random(packed: PackedWeight, x: torch.Tensor) -> None:
    expected, bound = reference.linear(x, packed), reference.error_bound(x, packed)
    for tokens in TOKENS:
        y = linear(x[:tokens], packed)
        assert ((y.double() - expected[:tokens]).abs() <= bound[:tokens]).all(), tokens
        assert torch.equal(y, linear(x[:tokens], packed)), "not the same bits twice"


@pytest.mark.parametrize(("bits", "zero", "scale_dtype"), support_matrix())
def test_every_kind_of_weight(bf16_isa, bits, zero, scale_dtype):
    for group_size, k in ((16, 128), (64, 128), (172, 172), (43, 172)):
        packed = packing.pack(random_weight(70, k, bits, group_size, zero, scale_dtype, permuted=group_size == 64))
        check_one_hot(packed, list(range(k)))
        check_random(packed, torch.randn(4, k).bfloat16())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 65), (65, 640), (172, 1100)])
def test_sizes(bf16_isa, bits, n, k):
    packed = packing.pack(random_weight(n, k, bits, -1 if k % 20 else 20))
    check_one_hot(packed, sorted({0, 1 % k, k // 2, k - 2 if k > 1 else 0, k - 1}))
    check_random(packed, torch.randn(4, k).bfloat16())


def test_segments_of_different_widths(bf16_isa):
    for permuted in (False, True):
        packed = packing.pack(mixed_weight("bfloat16", permuted))
        check_one_hot(packed, list(range(320)))
        check_random(packed, torch.randn(4, 320).bfloat16())


@pytest.mark.parametrize("bits", BITS)
def test_tiny_and_huge_activations(bf16_isa, bits):
    """Instructions that take subnormal numbers for 0, or flush subnormal sums, must not be used on them."""
    packed = packing.pack(random_weight(70, 128, bits, 64))
    size = torch.randint(-8, 9, (4, 128)).double().exp2() * torch.randn(4, 128).sign()
    for exponent in (-133, -126, -120, -110, -101, -99, -60, 100):
        x = (size * 2.0**exponent).bfloat16()
        check_random(packed, x)
    one = torch.zeros(1, 128, dtype=torch.bfloat16)
    one[0, 77] = 2.0**-133
    assert (linear(one, packed) != 0).any()


@pytest.mark.parametrize("bits", BITS)
def test_values_that_are_not_numbers(bf16_isa, bits):
    packed = packing.pack(random_weight(70, 128, bits, 64))
    for bad in (float("nan"), float("inf")):
        x = torch.randn(2, 128).bfloat16()
        x[1, 5] = bad
        y = linear(x, packed)
        assert torch.isfinite(y[0]).all() and not torch.isfinite(y[1]).any()


def test_the_instruction_set_changes_bf16_only():
    """With x in fp32 or fp16, or many tokens, the same bits as without products of pairs."""
    isas = torch.ops.mpq.cpu_isas().split(",")
    if "avx512bf16" not in isas:
        pytest.skip("this processor has no AVX512_BF16")
    packed = packing.pack(random_weight(70, 128, 7, 64))
    before = torch.ops.mpq.cpu_isa()
    try:
        for dtype, tokens in ((torch.float32, 2), (torch.float16, 2), (torch.bfloat16, 5)):
            x = torch.randn(tokens, 128).to(dtype)
            found = []
            for name in ("avx512bf16", "avx512vnni", "avx512"):
                torch.ops.mpq.set_cpu_isa(name)
                found.append(linear(x, packed))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    finally:
        torch.ops.mpq.set_cpu_isa(before)
