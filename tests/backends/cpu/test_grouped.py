"""`mpq::grouped_linear`: rows sorted by expert through one stacked weight, each expert of its own widths."""

import itertools

import pytest
import torch

from mpq_kernels.backends import BACKENDS
from mpq_kernels.errors import FormatError
from mpq_kernels.format import reference
from mpq_kernels.format.weights import PackedWeight, QuantizedWeight
from mpq_kernels.format.words import pack_weight
from tests.made.weights import BITS, X_DTYPES, mixed_weight, random_perm, random_weight

# Rows of each expert: none for some, all for one, none at all, one each, enough for the many-token kernels.
COUNTS = ([3, 0, 1, 5], [0, 9, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 2], [40, 7, 0, 200])


def stacked(rows: int, cols: int, widths, permuted: bool = False) -> PackedWeight:
    """Experts of `rows` x `cols`, one for each entry of `widths`: (bits, group size, kind of zeros)."""
    perm = random_perm(cols) if permuted else None
    experts = [
        QuantizedWeight(random_weight(rows, cols, bits, group, zero, seed=seed).blocks, perm)
        for seed, (bits, group, zero) in enumerate(widths)
    ]
    return pack_weight(QuantizedWeight.stack(experts))


def offsets_of(counts) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)


def operands(packed: PackedWeight) -> tuple:
    return packed.qweight, packed.scales, packed.zeros, packed.perm


def shape(packed: PackedWeight) -> tuple:
    return packed.layout.segment_ints(), packed.layout.out_features, packed.layout.in_features


def grouped(x, packed, offsets, bias=None):
    return torch.ops.mpq.grouped_linear(x, *operands(packed), bias, offsets, *shape(packed))


def one_by_one(x, packed, offsets, bias=None):
    """What each expert's rows alone give, through `mpq::linear`."""
    starts, experts = offsets.tolist(), len(offsets) - 1
    rows = packed.layout.out_features // experts
    parts = []
    for e in range(experts):
        part = packed.rows(e * rows, (e + 1) * rows)
        part_bias = None if bias is None else bias[e * rows : (e + 1) * rows]
        parts.append(torch.ops.mpq.linear(x[starts[e] : starts[e + 1]], *operands(part), part_bias, *shape(part)))
    return torch.cat(parts)


def check(x, packed, offsets, bias=None) -> None:
    y = grouped(x, packed, offsets, bias)
    experts = len(offsets) - 1
    rows = packed.layout.out_features // experts
    assert y.dtype == x.dtype and y.shape == (len(x), rows)
    expected, bound = reference.linear(x, packed, bias), reference.error_bound(x, packed, bias)
    starts = offsets.tolist()
    for e, (a, b) in enumerate(itertools.pairwise(starts)):
        band = slice(e * rows, (e + 1) * rows)
        assert ((y[a:b].double() - expected[a:b, band]).abs() <= bound[a:b, band]).all(), e
    assert torch.equal(y, one_by_one(x, packed, offsets, bias)), "not the bits of mpq::linear"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_every_width_and_every_spread_of_tokens(isa, bits, counts):
    packed = stacked(70, 128, [(bits, 64, "int"), (9 - bits, 16, "none"), (bits, 128, "int"), (4, 32, "int")])
    check(torch.randn(sum(counts), 128), packed, offsets_of(counts))


@pytest.mark.parametrize("dtype", X_DTYPES)
@pytest.mark.parametrize("permuted", [False, True])
def test_dtypes_biases_and_permutations(isa, dtype, permuted):
    packed = stacked(65, 172, [(2, 43, "float"), (5, 172, "float"), (3, 4, "none")], permuted)
    bias = torch.randn(3 * 65).to(dtype)
    check(torch.randn(11, 172).to(dtype), packed, offsets_of([2, 0, 9]), bias)


def test_experts_of_several_bands_and_column_segments(isa):
    one = mixed_weight()
    packed = pack_weight(QuantizedWeight.stack([one, mixed_weight(seed=50), mixed_weight(seed=90)]))
    check(torch.randn(8, 320), packed, offsets_of([5, 0, 3]))


@pytest.mark.parametrize("name", [n for n, b in BACKENDS.items() if not b.devices or "cpu" in b.devices])
def test_backends_agree(name):
    packed = stacked(70, 128, [(3, 64, "int"), (4, 32, "int")])
    x, offsets, bias = torch.randn(7, 128), offsets_of([3, 4]), torch.randn(140)
    y = BACKENDS[name].grouped(x, *operands(packed), bias, offsets, *shape(packed))
    bound = reference.error_bound(x, packed, bias)
    expected = reference.linear(x, packed, bias)
    assert ((y[:3].double() - expected[:3, :70]).abs() <= bound[:3, :70]).all()
    assert ((y[3:].double() - expected[3:, 70:]).abs() <= bound[3:, 70:]).all()


def test_strided_rows_and_any_number_of_threads(isa):
    packed = stacked(512, 1024, [(4, 64, "int"), (3, 64, "int")])
    wide = torch.randn(9, 1100)
    x, offsets = wide[:, 5:1029], offsets_of([8, 1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = grouped(x.contiguous(), packed, offsets)
        torch.set_num_threads(3)
        assert torch.equal(grouped(x, packed, offsets), one)
        assert torch.equal(grouped(x.T.contiguous().T, packed, offsets), one)
    finally:
        torch.set_num_threads(before)


def corrupt(**changes) -> dict:
    packed = stacked(70, 128, [(4, 64, "int"), (3, 64, "int")])
    args = {
        "x": torch.randn(5, 128), "qweight": packed.qweight, "scales": packed.scales, "zeros": packed.zeros,
        "perm": None, "bias": None, "offsets": offsets_of([2, 3]), "segments": packed.layout.segment_ints(),
        "out_features": 140, "in_features": 128,
    }  # fmt: skip
    return {**args, **changes}


def ints(*values, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


REFUSALS = [
    ({"offsets": ints(1, 2, 5)}, "offsets must begin with 0, not 1"),
    ({"offsets": ints(0, 6, 5)}, "offsets must end with|must not decrease"),
    ({"offsets": ints(0, -1, 5)}, r"must not decrease, and offsets\[1\]=-1 follows 0"),
    ({"offsets": ints(0, 2, 4)}, "offsets must end with the rows of x, 5, not 4"),
    ({"offsets": ints(0, 2, 6)}, "offsets must end with the rows of x, 5, not 6"),
    ({"offsets": ints(0)}, "one element for each expert and one more, not 1"),
    ({"offsets": ints(0, 1, 2, 5)}, "out_features=140 rows do not share out among 3 experts"),
    ({"offsets": ints(0, 1, 2, 3, 5)}, "lie in two experts of 35 rows"),
    ({"offsets": ints(0, 2, 5, dtype=torch.int64)}, "offsets must be int32"),
    ({"offsets": ints(0, 2, 5).view(1, 3)}, "one-dimensional"),
    ({"x": torch.randn(5, 127)}, "x must be"),
    ({"x": torch.randn(1, 5, 128)}, "x must be"),
    ({"x": torch.randn(5, 128).double()}, "x must be float32, float16 or bfloat16"),
    ({"bias": torch.zeros(70)}, "out_features=140 elements"),
    ({"qweight": torch.zeros(5, dtype=torch.int32)}, "qweight must have"),
    ({"zeros": None}, "segments name zeros, but none were given"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSALS, ids=[words[:40] for _, words in REFUSALS])
def test_refusals(changes, words):
    with pytest.raises(RuntimeError, match=words):
        torch.ops.mpq.grouped_linear(**corrupt(**changes))


@pytest.mark.parametrize("offsets", [ints(1, 5), ints(0, 3, 2, 5), ints(0, 4), ints(0, 1, 2, 5)], ids=str)
def test_the_reference_refuses_bad_offsets_too(offsets):
    args = corrupt(offsets=offsets)
    with pytest.raises(FormatError, match="offsets|share out"):
        BACKENDS["reference"].grouped(*args.values())


@pytest.mark.parametrize("counts", [[0, 0], [3, 2], [0, 5]], ids=str)
def test_opcheck(counts):
    packed = stacked(70, 128, [(3, 64, "int"), (6, 32, "int")], permuted=True)
    x, bias = torch.randn(sum(counts), 128), torch.randn(140)
    arguments = (x, *operands(packed), bias, offsets_of(counts), *shape(packed))
    torch.library.opcheck(torch.ops.mpq.grouped_linear.default, arguments)
