"""bf16 activations on the CPU, which some instruction sets multiply in pairs: every bit of the fp32 sums.

y is rounded to bf16, which hides most of a sum. Products with a one-hot x are therefore taken three times, each time
with a bias that takes off what is known already: the differences are exact in fp32, and three times 8 bits are all.
"""

import pytest
import torch

from mpq_kernels.format import reference
from mpq_kernels.format.weights import PackedWeight
from mpq_kernels.format.words import pack_weight
from tests.made.weights import BITS, mixed_weight, random_weight, support_matrix

FEW = (1, 2, 3, 4)
# One block of tokens, blocks of 3 and 4, several, ranges of them as work items, two chunks of the workspace.
MANY = (5, 6, 7, 16, 33, 129, 193)


def linear(x, packed: PackedWeight, bias=None):
    layout = packed.layout
    weight = (packed.qweight, packed.scales, packed.zeros, packed.perm)
    return torch.ops.mpq.linear(x, *weight, bias, layout.segment_ints(), layout.out_features, layout.in_features)


def fp32_columns(packed: PackedWeight, columns: list[int], tokens: list[int]) -> torch.Tensor:
    """Columns of the weight in fp32 [len(tokens), N]: those of some tokens of a product with a one-hot bf16 x."""
    x = torch.zeros(len(columns), packed.layout.in_features, dtype=torch.bfloat16)
    x[torch.arange(len(columns)), torch.tensor(columns)] = 1.0
    known = torch.zeros(len(tokens), packed.layout.out_features)
    for _ in range(3):
        known = known + torch.stack([linear(x, packed, -row)[m] for m, row in zip(tokens, known, strict=True)]).float()
    return known


def check_one_hot(packed: PackedWeight, columns: list[int]) -> None:
    """Products of 1 to 4 tokens, whose columns follow each other in `columns`."""
    dense = reference.dequantize(packed)
    for tokens in FEW:
        for i in range(0, len(columns) - tokens + 1, tokens * len(FEW)):
            picked = columns[i : i + tokens]
            assert torch.equal(fp32_columns(packed, picked, list(range(tokens))), dense[:, picked].T), picked


def check_one_hots(packed: PackedWeight, tokens: int, step: int) -> None:
    """A product of many tokens, token m with column m * step: three tokens of it."""
    k = packed.layout.in_features
    columns = [m * step % k for m in range(tokens)]
    some = [0, tokens // 2, tokens - 1]
    picked = [columns[m] for m in some]
    assert torch.equal(fp32_columns(packed, columns, some), reference.dequantize(packed)[:, picked].T), picked


def check_random(packed: PackedWeight, x: torch.Tensor, counts=FEW) -> None:
    expected, bound = reference.linear(x, packed), reference.error_bound(x, packed)
    for tokens in counts:
        y = linear(x[:tokens], packed)
        assert ((y.double() - expected[:tokens]).abs() <= bound[:tokens]).all(), tokens
        assert torch.equal(y, linear(x[:tokens], packed)), "not the same bits twice"


@pytest.mark.parametrize(("bits", "zero", "scale_dtype"), support_matrix())
def test_every_kind_of_weight(bf16_isa, bits, zero, scale_dtype):
    for group_size, k in ((16, 128), (43, 172)):
        packed = pack_weight(random_weight(70, k, bits, group_size, zero, scale_dtype, permuted=group_size == 16))
        check_one_hot(packed, list(range(k)))
        check_random(packed, torch.randn(4, k).bfloat16())
        for step in (1, 19):  # of the first, second and third: every place of a pair and of a chunk
            check_one_hots(packed, 16, step)
        check_random(packed, torch.randn(7, k).bfloat16(), (5, 7))


@pytest.mark.parametrize("bits", BITS)
def test_many_tokens(bf16_isa, bits):
    """Groups of more columns than a span; an odd number of columns, and so many rows that tokens are not split."""
    packed = pack_weight(random_weight(70, 384, bits, 192))
    for tokens in MANY:
        check_one_hots(packed, tokens, 7)
    check_random(packed, torch.randn(MANY[-1], 384).bfloat16(), MANY)
    packed = pack_weight(random_weight(1100, 65, bits, 65))
    for tokens in (7, 129):
        check_one_hots(packed, tokens, 16)


@pytest.mark.parametrize("bits", BITS)
def test_every_column_of_many_tokens(bf16_isa, bits):
    """To the 8 bits of y, where the test above has all 24 for some."""
    packed = pack_weight(random_weight(70, 128, bits, 16, permuted=True))
    y = linear(torch.eye(128).bfloat16(), packed)
    assert torch.equal(y, reference.dequantize(packed).T.bfloat16())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 65), (65, 640), (172, 1100)])
def test_sizes(bf16_isa, bits, n, k):
    packed = pack_weight(random_weight(n, k, bits, -1 if k % 20 else 20))
    check_one_hot(packed, sorted({0, 1 % k, k // 2, k - 2 if k > 1 else 0, k - 1}))
    check_random(packed, torch.randn(4, k).bfloat16())


def test_segments_of_different_widths(bf16_isa):
    for permuted in (False, True):
        packed = pack_weight(mixed_weight("bfloat16", permuted))
        check_one_hot(packed, list(range(320)))
        check_random(packed, torch.randn(33, 320).bfloat16(), (*FEW, 5, 33))
        for tokens in (5, 33, 129):
            check_one_hots(packed, tokens, 31)


@pytest.mark.parametrize("bits", BITS)
def test_tiny_and_huge_activations(bf16_isa, bits):
    """Instructions that take subnormal numbers for 0, or flush subnormal sums, must not be used on them."""
    packed = pack_weight(random_weight(70, 128, bits, 64))
    size = torch.randint(-8, 9, (7, 128)).double().exp2() * torch.randn(7, 128).sign()
    for exponent in (-133, -126, -120, -110, -101, -99, -60, 100):
        x = (size * 2.0**exponent).bfloat16()
        check_random(packed, x, (*FEW, 7))
    for tokens in (1, 7, 193):
        one = torch.zeros(tokens, 128, dtype=torch.bfloat16)
        one[-1, 77] = 2.0**-133
        y = linear(one, packed)
        assert (y[-1] != 0).any() and not y[:-1].any()


@pytest.mark.parametrize("bits", BITS)
def test_values_that_are_not_numbers(bf16_isa, bits):
    packed = pack_weight(random_weight(70, 128, bits, 64))
    for bad in (float("nan"), float("inf")):
        for tokens in (2, 7, 33):
            x = torch.randn(tokens, 128).bfloat16()
            good = linear(x, packed)
            x[1, 5] = bad
            y = linear(x, packed)
            assert not torch.isfinite(y[1]).any()
            good[1] = y[1] = 0
            assert torch.equal(y, good)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_depends_on_its_token_only(bf16_isa, bits):
    """The same bits whatever the number of tokens and of threads, the number of tokens being more than 4."""
    packed = pack_weight(random_weight(70, 192, bits, 64))
    x = torch.randn(MANY[-1], 192).bfloat16()
    whole = linear(x, packed)
    for tokens in MANY:
        assert torch.equal(linear(x[-tokens:], packed), whole[-tokens:]), tokens
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(linear(x, packed), whole)
    finally:
        torch.set_num_threads(threads)


def test_the_instruction_set_changes_bf16_only():
    """With x in fp32 or fp16, with a tiny x, or with groups that are not whole chunks, the same bits as without."""
    isas = torch.ops.mpq.cpu_isas().split(",")
    if "avx512bf16" not in isas:
        pytest.skip("this processor has no AVX512_BF16")
    chunks = pack_weight(random_weight(640, 172, 7, 172))
    others = pack_weight(random_weight(640, 172, 7, 43))
    tiny = torch.randn(33, 172)
    tiny[20, 171] = 2.0**-101
    before = torch.ops.mpq.cpu_isa()
    try:
        for tokens in (2, 5, 33):
            x = torch.randn(tokens, 172)
            cases = [(x, chunks), (x.half(), chunks), (x.bfloat16(), others), (tiny[-tokens:].bfloat16(), chunks)]
            for i, (value, packed) in enumerate(cases if tokens == 33 else cases[:3]):
                assert same_bits(value, packed), (tokens, i)
            assert not same_bits(x.bfloat16(), chunks), "pairs are not multiplied"
    finally:
        torch.ops.mpq.set_cpu_isa(before)


def same_bits(x, packed: PackedWeight) -> bool:
    """Of y with three instruction sets; those of token 0 also of what the rounding of y left over."""
    found = []
    for name in ("avx512bf16", "avx512vnni", "avx512"):
        torch.ops.mpq.set_cpu_isa(name)
        y = linear(x, packed)
        found.append(torch.cat([y, linear(x, packed, -y[0])[:1]]))
    return torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
