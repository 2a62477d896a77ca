"""Products with int8 activations: integer sums exact, the documented bounds, the same bits however they are cut up."""

import itertools

import pytest
import torch

from mpq_kernels import FormatError, MixedLinear, UnsupportedError
from mpq_kernels.backends import select
from mpq_kernels.format import reference, reference_int8
from mpq_kernels.format.layout import Segment
from mpq_kernels.format.weights import QuantizedBlock, QuantizedWeight
from mpq_kernels.format.words import pack_weight
from mpq_kernels.nn.experts import GroupedLinear
from tests.made.weights import BITS, X_DTYPES, mixed_weight, random_block, random_perm, random_weight, support_matrix

# (K, group size): whole chunks of 16 columns, several blocks of a group, groups that end inside a chunk, one column.
COLUMNS = ((128, 64), (256, 32), (320, 16), (640, 160), (640, 640), (512, 256), (172, 172), (172, 43), (63, 7), (65, 1))
TOKENS = (1, 2, 3, 4, 5, 17)


def product(x, packed, bias=None):
    weight = (packed.qweight, packed.scales, packed.zeros, packed.perm)
    layout = packed.layout
    shape = (layout.segment_ints(), layout.out_features, layout.in_features)
    return torch.ops.mpq.linear_int8(x, *weight, bias, *shape)


def check(isas, packed, dtype=torch.float32, bias=None, tokens=TOKENS):
    """Within the bound of rounding x of the exact product, and within fp32 roundings of the product with rounded x."""
    x = torch.randn(max(tokens), packed.layout.in_features).to(dtype)
    exact, near = reference.linear(x, packed, bias), reference_int8.linear_int8(x, packed, bias)
    wide, narrow = reference_int8.error_bound(x, packed, bias), reference_int8.accumulation_bound(x, packed, bias)
    for isa in isas:
        torch.ops.mpq.set_cpu_isa(isa)
        whole = product(x, packed, bias)
        for count in tokens:
            y = product(x[:count], packed, bias)
            assert y.dtype == dtype and torch.equal(y, whole[:count]), f"{isa}: {count} tokens give other bits"
            assert ((y.double() - near[:count]).abs() <= narrow[:count]).all(), isa
            assert ((y.double() - exact[:count]).abs() <= wide[:count]).all(), isa


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("k", "group_size"), COLUMNS)
def test_every_width_and_group(int8_isas, bits, k, group_size):
    zero = ("int", "none", "float")[(bits + k) % 3]
    check(
        int8_isas, pack_weight(random_weight((70, 64, 1)[bits % 3], k, bits, group_size, zero, permuted=bits % 2 == 1))
    )


@pytest.mark.parametrize(("bits", "zero", "scale_dtype"), support_matrix())
def test_every_kind_of_weight(int8_isas, bits, zero, scale_dtype):
    k, group_size = ((128, 16), (128, 64), (172, 43))[(bits + len(zero) + len(scale_dtype)) % 3]
    check(
        int8_isas, pack_weight(random_weight(70, k, bits, group_size, zero, scale_dtype, permuted=True)), tokens=(1, 5)
    )


@pytest.mark.parametrize("dtype", X_DTYPES)
@pytest.mark.parametrize("permuted", [False, True])
def test_segments_of_different_widths_in_one_call(int8_isas, dtype, permuted):
    packed = pack_weight(mixed_weight("bfloat16", permuted))
    check(int8_isas, packed, dtype)
    check(int8_isas, packed, dtype, torch.randn(200).to(dtype))


def test_a_large_weight_and_many_tokens(int8_isas):
    check(int8_isas, pack_weight(random_weight(70, 4096, 3, 64)), tokens=(1, 401))


def integer_weight(bits, k, group_size, codes):
    """Scales of 1 and integer zeros, so that every number of the product is an integer."""
    groups = k // group_size
    n = codes.shape[0]
    zeros = torch.randint(0, min(256, 1 << bits), (n, groups)).to(torch.uint8)
    return QuantizedWeight.uniform(QuantizedBlock(bits, codes, torch.ones(n, groups), zeros), random_perm(k, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("k", "group_size"), [(256, 64), (384, 128), (384, 384), (172, 43), (320, 160)])
def test_integer_sums_are_exact(int8_isas, bits, k, group_size):
    torch.manual_seed(bits * k)
    top = (1 << bits) - 1
    codes = torch.randint(0, top + 1, (66, k), dtype=torch.uint8)
    codes[0] = top  # with x at its ends: what would not fit into 16 bits shows here
    codes[1] = 0
    weight = integer_weight(bits, k, group_size, codes)
    x = torch.randint(-127, 128, (7, k)).float()
    x[0], x[1], x[2, ::2] = 127, -127, -127
    for begin, _ in reference_int8.blocks_of(weight.layout.segments[0]):
        x[:, weight.perm[begin]] = 127  # amax of every block is 127, so x is its own codes
    zeros = weight.blocks[0][2].zeros.long().repeat_interleave(group_size, 1)
    expected = x.long()[:, weight.perm.long()] @ (codes.long() - zeros).T
    assert expected.abs().max() < 2**24, "would not be exact in fp32"
    packed = pack_weight(weight)
    for isa, count in itertools.product(int8_isas, (1, 2, 3, 4, 7)):
        torch.ops.mpq.set_cpu_isa(isa)
        assert torch.equal(product(x[:count], packed).long(), expected[:count]), isa


def test_groups_with_a_scale_of_zero_add_nothing(int8_isa):
    """Whatever their codes and zeros are."""
    for bits, zero in itertools.product(BITS, ("int", "none", "float")):
        block = random_weight(70, 256, bits, 64, zero).blocks[0][2]
        block.scales[::2] = 0
        block.scales[1::4, 1] = 0
        packed = pack_weight(QuantizedWeight.uniform(block))
        for tokens in (1, 9):
            x = torch.randn(tokens, 256)
            y = product(x, packed)
            near, bound = reference_int8.linear_int8(x, packed), reference_int8.accumulation_bound(x, packed)
            assert not y[:, ::2].any() and ((y.double() - near).abs() <= bound).all()


def test_ties_go_to_even(int8_isa):
    k = 128
    weight = integer_weight(1, k, 128, torch.ones(4, k, dtype=torch.uint8))
    x = torch.zeros(1, k)
    order = weight.perm.long()
    x[0, order[:6]] = torch.tensor([127.0, 0.5, 1.5, -0.5, -2.5, 3.5])  # codes 127, 0, 2, 0, -2, 4
    zero = weight.blocks[0][2].zeros.float().view(1, -1)
    assert torch.equal(product(x, pack_weight(weight)), 131 * (1 - zero))


def test_bad_values_make_their_row_nan_and_no_other(int8_isa):
    packed = pack_weight(random_weight(70, 172, 4, 43))
    for tokens, bad in itertools.product((3, 9), (float("nan"), float("inf"), -float("inf"))):
        x = torch.randn(tokens, 172)
        clean = product(x, packed)
        x[1, 100] = bad
        y = product(x, packed)
        keep = torch.arange(tokens) != 1
        assert torch.equal(y[keep], clean[keep]) and y[1].isnan().all()


@pytest.mark.parametrize("size", [0.0, 2.0**-126, 2.0**-101, 2.0**-100, 2.0**-60, 2.0**60])
def test_blocks_of_any_size(int8_isa, size):
    packed = pack_weight(random_weight(70, 256, 4, 64, scale_dtype="float32"))
    x = torch.randn(5, 256).clamp(-1, 1)
    x[:, ::64] = 1.0  # amax of every block is 1
    x[:, :128] *= size
    near, bound = reference_int8.linear_int8(x, packed), reference_int8.accumulation_bound(x, packed)
    assert ((product(x, packed).double() - near).abs() <= bound).all()
    total = (product(x, packed).double() - reference.linear(x, packed)).abs()
    assert (total <= reference_int8.error_bound(x, packed)).all()


def test_the_error_bound_is_not_idle():
    """Somewhere rounding x uses a good part of its bound, and the narrow bound would not hold for the exact product."""
    packed = pack_weight(random_weight(64, 64, 8, 64, "none"))
    x = torch.randn(2000, 64)
    error = (product(x, packed).double() - reference.linear(x, packed)).abs()
    assert (error / reference_int8.error_bound(x, packed)).max() > 0.2
    assert (error > reference_int8.accumulation_bound(x, packed)).any()


def test_same_bits_for_any_number_of_threads(int8_isa):
    weights = [pack_weight(mixed_weight()), pack_weight(random_weight(1024, 1024, 3, 64))]
    before = torch.get_num_threads()
    try:
        for packed, tokens in itertools.product(weights, (1, 3, 40)):
            x = torch.randn(tokens, packed.layout.in_features)
            torch.set_num_threads(1)
            one = product(x, packed)
            torch.set_num_threads(3)
            assert all(torch.equal(product(x, packed), one) for _ in range(5))
    finally:
        torch.set_num_threads(before)


def test_shapes_and_strides(int8_isa):
    packed = pack_weight(random_weight(70, 128, 3, 64))
    x = torch.randn(2, 3, 128)
    flat = product(x.view(6, 128), packed)
    assert torch.equal(product(x, packed), flat.view(2, 3, 70))
    assert product(x[:, :0], packed).shape == (2, 0, 70)
    wide = torch.randn(6, 300)
    wide[:, 7:135] = x.view(6, 128)
    assert torch.equal(product(wide[:, 7:135], packed), flat)
    assert torch.equal(product(x.view(6, 128).T.contiguous().T, packed), flat)


def test_experts_are_their_own_products(int8_isa):
    bands = (Segment(0, 40, 0, 192, 3, 64, "int"), Segment(40, 80, 0, 192, 8, 32, "none"))
    blocks = tuple((s.n0, s.k0, random_block(s.rows, s.cols, s.bits, s.group_size, s.zero)) for s in bands)
    packed = pack_weight(QuantizedWeight(blocks, random_perm(192)))
    layer = GroupedLinear.from_stacked(packed, 2, torch.randn(80), activations="int8")
    for rows in ((1, 0), (3, 9), (0, 2), (0, 0), (5, 4)):
        x = torch.randn(sum(rows), 192)
        offsets = torch.tensor([0, rows[0], sum(rows)], dtype=torch.int32)
        y = layer(x, offsets)
        for e in range(2):
            part = slice(offsets[e], offsets[e + 1])
            alone = product(x[part], packed.rows(40 * e, 40 * e + 40), layer.bias[40 * e : 40 * e + 40])
            assert torch.equal(y[part], alone)
    with pytest.raises(FormatError, match="offsets must say"):
        layer(torch.randn(2, 192))


def test_operators():
    packed = pack_weight(random_weight(70, 128, 3, 64, permuted=True))
    weight = (packed.qweight, packed.scales, packed.zeros, packed.perm)
    shape = (packed.layout.segment_ints(), 70, 128)
    x = torch.randn(3, 128)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.mpq.linear_int8.default, (x, *weight, None, *shape), test_utils=tests)
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    args = (x, *weight, torch.randn(70), offsets, *shape)
    torch.library.opcheck(torch.ops.mpq.grouped_linear_int8.default, args, test_utils=tests)
    with pytest.raises(RuntimeError, match="qweight must have"):
        torch.ops.mpq.linear_int8(x, packed.qweight[1:], *weight[1:], None, *shape)


def test_a_layer_changes_only_when_it_is_told():
    packed = pack_weight(random_weight(70, 128, 4, 64))
    x = torch.randn(3, 128)
    layer = MixedLinear.from_packed(packed)
    exact = layer(x)
    assert layer.activations == "exact" and "activations" not in layer.extra_repr()
    layer.set_activations("int8")
    assert torch.equal(layer(x), product(x, packed)) and not torch.equal(layer(x), exact)
    assert "activations=int8" in layer.extra_repr() and layer.backend == "cpu"
    assert torch.equal(layer.half()(x), product(x, packed)), "a cast of the layer changed its mode"
    layer.set_activations("exact")
    assert torch.equal(layer(x), exact)
    assert torch.equal(MixedLinear.from_packed(packed, activations="int8")(x), product(x, packed))


def test_gradients_are_those_of_the_exact_product():
    packed = pack_weight(random_weight(70, 128, 4, 64))
    layer = MixedLinear.from_packed(packed, torch.randn(70), activations="int8")
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    expected = reference.dequantize(packed).sum(0).expand(3, 128)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-4)


def test_refusals():
    packed = pack_weight(random_weight(4, 64, 4))
    with pytest.raises(UnsupportedError) as caught:
        select(packed.layout, "cuda", activations="int8")
    text = str(caught.value)
    assert "on cuda with int8 activations" in text and "cuda: has no kernels for int8 activations" in text
    assert "cpu: runs on cpu, not on cuda" in text
    with pytest.raises(UnsupportedError, match="reference: has no kernels for int8"):
        MixedLinear.from_packed(packed, backend="reference", activations="int8")
    with pytest.raises(UnsupportedError, match="activations='int4' is not one of exact, int8"):
        MixedLinear.from_packed(packed, activations="int4")
    layer = MixedLinear.from_packed(packed, backend="reference")
    with pytest.raises(UnsupportedError, match="reference: has no kernels for int8"):
        layer.set_activations("int8")
    assert layer.activations == "exact" and layer(torch.ones(1, 64)).isfinite().all()
