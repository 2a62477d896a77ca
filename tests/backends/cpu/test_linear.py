"""`mpq::linear` and `mpq::dequantize` as operators: exactness, bounds, refusals, opcheck, compile, export."""

import itertools

import pytest
import torch

from mpq_kernels.format import reference
from mpq_kernels.format.weights import PackedWeight, QuantizedWeight
from mpq_kernels.format.words import pack_weight
from tests.made.weights import BITS, SIZES, TOKENS, X_DTYPES, mixed_weight, random_weight, support_matrix

# Wide and tall sizes of real models, each against a small odd one, so that a case stays a few milliseconds.
LARGE = ((4096, 65), (65, 4096), (11008, 63), (172, 11008))


def arguments(packed: PackedWeight) -> tuple:
    return packed.qweight, packed.scales, packed.zeros, packed.perm


def shape(packed: PackedWeight) -> tuple:
    return packed.layout.segment_ints(), packed.layout.out_features, packed.layout.in_features


def linear(x, packed, bias=None):
    return torch.ops.mpq.linear(x, *arguments(packed), bias, *shape(packed))


def dequantize(packed, dtype=torch.float32):
    return torch.ops.mpq.dequantize(*arguments(packed), *shape(packed), dtype)


def group_of(k: int, index: int) -> int:
    """A group size for K columns: powers of two where they divide, odd divisors, all of K."""
    sizes = [g for g in (16, 32, 64, 128, 5, 43, 86, 172, 3, 1, k) if k % g == 0]
    return sizes[index % len(sizes)]


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Integer view: equality of bits, so that -0 is not 0 and NaN is NaN."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def one_hot(k: int, columns) -> torch.Tensor:
    x = torch.zeros(len(columns), k)
    x[torch.arange(len(columns)), torch.tensor(columns)] = 1.0
    return x


def check_one_hot(packed: PackedWeight, columns) -> None:
    """Columns through the many-token and the few-token kernels are the dequantized weight, bit for bit."""
    dense = reference.dequantize(packed)
    assert torch.equal(bits_of(dequantize(packed)), bits_of(dense))
    x = one_hot(dense.shape[1], columns)
    expected = bits_of(dense[:, columns].T)
    assert torch.equal(bits_of(linear(x, packed)), expected)
    for tokens in (1, 2, 3, 4):
        picked = list(range(0, len(columns) - tokens + 1, max(1, len(columns) // 12)))
        for i in picked:
            assert torch.equal(bits_of(linear(x[i : i + tokens], packed)), expected[i : i + tokens])


def check_random(packed: PackedWeight, dtype: torch.dtype, bias: torch.Tensor | None = None) -> None:
    x = torch.randn(max(TOKENS), packed.layout.in_features).to(dtype)
    expected, bound = reference.linear(x, packed, bias), reference.error_bound(x, packed, bias)
    for tokens in TOKENS:
        y = linear(x[:tokens], packed, bias)
        assert y.dtype == dtype and y.shape == (tokens, packed.layout.out_features)
        assert ((y.double() - expected[:tokens]).abs() <= bound[:tokens]).all(), tokens
        assert torch.equal(bits_of(y), bits_of(linear(x[:tokens], packed, bias))), "not the same bits twice"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", SIZES)
def test_small_and_odd_sizes(isa, n, bits):
    for index, k in enumerate(SIZES):
        weight = random_weight(n, k, bits, group_of(k, n + index + bits), ("int", "none", "float")[(n + bits) % 3])
        packed = pack_weight(weight)
        check_one_hot(packed, list(range(k)))
        check_random(packed, torch.float32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k"), LARGE)
def test_large_sizes(isa, n, k, bits):
    packed = pack_weight(random_weight(n, k, bits, group_of(k, bits), permuted=bits % 2 == 0))
    check_one_hot(packed, sorted({0, 1, 15, 16, 62, k // 2, k - 2, k - 1}))
    x = torch.randn(17, k)
    expected, bound = reference.linear(x, packed), reference.error_bound(x, packed)
    for tokens in (1, 2, 17):
        assert ((linear(x[:tokens], packed).double() - expected[:tokens]).abs() <= bound[:tokens]).all()


@pytest.mark.parametrize("bits", [3])
def test_a_full_size_projection(bits):
    packed = pack_weight(random_weight(4096, 11008, bits, 64))
    check_one_hot(packed, [0, 5000, 11007])
    x = torch.randn(2, 11008, dtype=torch.bfloat16)
    expected, bound = reference.linear(x, packed), reference.error_bound(x, packed)
    assert ((linear(x, packed).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize(("bits", "zero", "scale_dtype"), support_matrix())
def test_every_kind_of_weight(isa, bits, zero, scale_dtype):
    for group_size in (16, 64, 43):
        k = 128 if group_size != 43 else 172
        packed = pack_weight(random_weight(70, k, bits, group_size, zero, scale_dtype, permuted=True))
        check_one_hot(packed, list(range(0, k, 5)))
        x = torch.randn(5, k)
        expected, bound = reference.linear(x, packed), reference.error_bound(x, packed)
        for tokens in (1, 5):
            assert ((linear(x[:tokens], packed).double() - expected[:tokens]).abs() <= bound[:tokens]).all()


@pytest.mark.parametrize("dtype", X_DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_segments_of_different_widths_in_one_call(isa, dtype, with_bias, permuted):
    packed = pack_weight(mixed_weight("bfloat16", permuted))
    check_one_hot(packed, list(range(320)))
    bias = torch.randn(200).to(dtype) if with_bias else None
    check_random(packed, dtype, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_low_precision_x_and_dequantize_round_once(isa, dtype, bits):
    packed = pack_weight(random_weight(65, 128, bits, 64, permuted=True))
    dense = reference.dequantize(packed).to(dtype)
    assert torch.equal(bits_of(dequantize(packed, dtype)), bits_of(dense))
    x = one_hot(128, list(range(128))).to(dtype)
    assert torch.equal(bits_of(linear(x, packed)), bits_of(dense.T))
    check_random(packed, dtype)


def test_shapes_and_strides(isa):
    packed = pack_weight(random_weight(70, 128, 3, 64))
    x = torch.randn(2, 3, 128)
    flat = linear(x.view(6, 128), packed)
    assert torch.equal(linear(x, packed), flat.view(2, 3, 70))
    assert torch.equal(linear(x[0, 0], packed), linear(x[0, :1], packed)[0])
    assert linear(x[:, :0], packed).shape == (2, 0, 70)
    wide = torch.randn(6, 300)
    wide[:, 7:135] = x.view(6, 128)
    views = {
        "row stride": wide[:, 7:135],
        "transposed": x.view(6, 128).T.contiguous().T,
        "every other row": x.view(6, 128).repeat_interleave(2, 0)[::2],
    }
    for name, view in views.items():
        assert not view.is_contiguous() and torch.equal(linear(view, packed), flat), name
    expanded = x[0, :1].expand(5, 128)
    assert torch.equal(linear(expanded, packed), linear(expanded.contiguous(), packed))


def test_unaligned_tensors(isa):
    packed = pack_weight(random_weight(70, 128, 7, 32, "float"))
    moved = {}
    for name, tensor in packed.tensors().items():
        raw = torch.empty(tensor.numel() * tensor.element_size() + 64, dtype=torch.uint8)
        start = tensor.element_size() - raw.data_ptr() % tensor.element_size() + 16 * (name == "scales")
        view = raw[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype)
        moved[name] = view.copy_(tensor)
    x = torch.randn(3, 128)
    assert torch.equal(linear(x, PackedWeight(packed.layout, **moved)), linear(x, packed))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_stay_in_their_row(isa, bad):
    packed = pack_weight(random_weight(70, 172, 4, 43))
    for tokens in (3, 9):
        x = torch.randn(tokens, 172)
        clean = linear(x, packed)
        x[1, 100] = bad
        y = linear(x, packed)
        keep = torch.arange(tokens) != 1
        assert torch.equal(y[keep], clean[keep]) and not torch.isfinite(y[1]).all()


def test_same_bits_for_any_number_of_threads(isa):
    # Of these, 1024 x 1024 is shared among threads even for one token.
    weights = [pack_weight(mixed_weight()), pack_weight(random_weight(1024, 1024, 3, 64))]
    before = torch.get_num_threads()
    try:
        for packed, tokens in itertools.product(weights, (1, 3, 40)):
            x = torch.randn(tokens, packed.layout.in_features)
            torch.set_num_threads(1)
            one = linear(x, packed)
            torch.set_num_threads(3)
            assert all(torch.equal(linear(x, packed), one) for _ in range(5))
    finally:
        torch.set_num_threads(before)


def corrupt(packed, **changes):
    args = {
        "x": torch.randn(2, 128), "qweight": packed.qweight, "scales": packed.scales, "zeros": packed.zeros,
        "perm": None, "bias": None, "segments": packed.layout.segment_ints(), "out_features": 70, "in_features": 128,
    }  # fmt: skip
    return {**args, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.randn(2, 127)}, "x must be"),
        ({"x": torch.randn(2, 128).double()}, "x must be float32, float16 or bfloat16"),
        ({"qweight": torch.zeros(5, dtype=torch.int32)}, "qweight must have"),
        ({"qweight": torch.zeros(5)}, "qweight has the wrong dtype"),
        ({"scales": torch.ones(5, dtype=torch.float16)}, "scales must have"),
        ({"scales": torch.ones(256, dtype=torch.float64)}, "scales must be float32"),
        ({"zeros": None}, "segments name zeros, but none were given"),
        ({"zeros": torch.zeros(256)}, "integer zeros must be uint8"),
        ({"perm": torch.zeros(3, dtype=torch.int32)}, "perm must have in_features=128"),
        ({"perm": torch.full((128,), 128, dtype=torch.int32)}, "perm has a value outside 0..127"),
        ({"perm": torch.full((128,), -1, dtype=torch.int32)}, "perm has a value outside 0..127"),
        ({"bias": torch.zeros(3)}, "bias must be contiguous on the CPU with out_features=70"),
        ({"segments": [0, 70, 0, 128, 4, 64]}, "segments must hold 7 integers each"),
        ({"segments": []}, "segments must hold 7 integers each"),
        ({"segments": [0, 70, 0, 128, 9, 64, 2]}, "bits=9 is not 1..8"),
        ({"segments": [0, 70, 0, 128, 4, 60, 2]}, "group_size=60 does not divide"),
        ({"segments": [0, 71, 0, 128, 4, 64, 2]}, "do not fit 70 x 128"),
        ({"segments": [0, 69, 0, 128, 4, 64, 2]}, "do not cover 70 x 128"),
        ({"segments": [0, 70, 0, 128, 4, 64, 5]}, "unknown kind of zeros"),
        ({"segments": [0, 70, 0, 128, 4, 64, -1]}, "unknown kind of zeros"),
        ({"out_features": 0}, r"must be 1\.\.2147483647"),
    ],
)
def test_refusals(changes, words):
    packed = pack_weight(random_weight(70, 128, 4, 64))
    with pytest.raises(RuntimeError, match=words):
        torch.ops.mpq.linear(**corrupt(packed, **changes))


def test_isa_is_chosen_by_name(isa):
    assert torch.ops.mpq.cpu_isa() == isa
    with pytest.raises(RuntimeError, match="unknown instruction set sse9"):
        torch.ops.mpq.set_cpu_isa("sse9")


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_opcheck(tokens):
    for weight in (random_weight(70, 128, 3, 64, permuted=True), mixed_weight()):
        packed = pack_weight(weight)
        x = torch.randn(tokens, packed.layout.in_features)
        bias = torch.randn(packed.layout.out_features)
        torch.library.opcheck(torch.ops.mpq.linear.default, (x, *arguments(packed), bias, *shape(packed)))
        torch.library.opcheck(torch.ops.mpq.dequantize.default, (*arguments(packed), *shape(packed), torch.bfloat16))


@pytest.mark.parametrize("zero", ["int", "none", "float"])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_groups_with_a_scale_of_zero_add_nothing(isa, scale_dtype, zero):
    """Whatever their codes and zeros are. Rows of such groups are exactly 0, beside the least scales that fp16 has."""
    for bits in BITS:
        block = random_weight(65, 192, bits, 64, zero, scale_dtype).blocks[0][2]
        block.scales[::2] = 0
        block.scales[1::4, 1] = 0
        if scale_dtype == "float16":
            block.scales[3::4] = torch.tensor([1.0, 3.0, -2.0]).mul_(2.0**-24).half()
        packed = pack_weight(QuantizedWeight.uniform(block))
        check_one_hot(packed, list(range(0, 192, 7)))
        for dtype in X_DTYPES:
            check_random(packed, dtype)
            x = torch.randn(max(TOKENS), 192).to(dtype)
            for tokens in TOKENS:
                assert not linear(x[:tokens], packed)[:, ::2].any()
