"""What the Triton kernels must compute, run by pytest in a process of its own under TRITON_INTERPRET=1.

test_interpreted.py starts it: the interpreter is chosen when triton is imported, for a whole process. Every product is
one program or few, because the interpreter takes a tenth of a second for each step of one.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from mpq_kernels import FormatError, MixedLinear
from mpq_kernels.backends import BACKENDS
from mpq_kernels.backends.triton import configs, launch, work
from mpq_kernels.backends.triton.configs import Config
from mpq_kernels.format import reference
from mpq_kernels.format.codes import FORMATS, SCALE_DTYPES
from mpq_kernels.format.layout import Segment
from mpq_kernels.format.weights import QuantizedWeight
from mpq_kernels.format.words import pack_weight
from tests.made.weights import MIXED_SEGMENTS, ZEROS, mixed_weight, random_block, random_perm, random_weight

DTYPES = (torch.float16, torch.bfloat16)
TRITON = BACKENDS["triton"]
ONE_PROGRAM = Config(64, num_warps=1, programs_per_unit=1)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """As few programs as there can be, unless a test asks for another configuration."""
    monkeypatch.setattr(configs, "choose", lambda device, tokens, tuned=None: ONE_PROGRAM)


def operands(packed):
    return packed.qweight, packed.scales, packed.zeros, packed.perm


def shape(packed):
    return packed.layout.segment_ints(), packed.layout.out_features, packed.layout.in_features


def linear(x, packed, bias=None):
    return TRITON.linear(x, *operands(packed), bias, *shape(packed))


def check(y, x, packed, bias=None, rows=slice(None)):
    assert y.dtype == x.dtype
    error = (y.double() - reference.linear(x, packed, bias)[:, rows]).abs()
    assert (error <= reference.error_bound(x, packed, bias)[:, rows]).all()


def test_the_interpreter_runs_these():
    assert launch.INTERPRETED and TRITON.why_unavailable() is None


@pytest.mark.parametrize("zero", ZEROS)
def test_groups_with_a_scale_of_zero_add_nothing(zero):
    """Whatever their codes and zeros are, beside the least scales that fp16 has."""
    block = random_weight(64, 128, 3, 64, zero).blocks[0][2]
    block.scales[::2] = 0
    block.scales[1::4] = torch.tensor([1.0, -3.0]).mul_(2.0**-24).half()
    packed = pack_weight(QuantizedWeight.uniform(block))
    x = torch.randn(3, 128).half()
    y = linear(x, packed)
    check(y, x, packed)
    assert zero == "min" or not y[:, ::2].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("bits", FORMATS)
def test_one_hot_x_gives_the_weight(bits, zero, dtype):
    # Every scale dtype meets every width and every kind of zeros, here or in test_dequantize.
    packed = pack_weight(random_weight(60, 64, bits, 64, zero, SCALE_DTYPES[bits % 3], seed=bits))
    y = linear(torch.eye(64).to(dtype), packed)
    assert torch.equal(y.T, reference.dequantize(packed, dtype))


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("bits", FORMATS)
def test_dequantize(bits, zero):
    scale_dtype = SCALE_DTYPES[(bits + 1 + ZEROS.index(zero)) % 3]
    packed = pack_weight(random_weight(66, 64, bits, (32, 64, 4)[bits % 3], zero, scale_dtype))
    w = TRITON.dequantize(*operands(packed), *shape(packed), torch.float32)
    assert torch.equal(w, reference.dequantize(packed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dequantize_rounds_once_and_undoes_the_permutation(dtype):
    packed = pack_weight(random_weight(65, 172, 3, 43, "float", permuted=True))
    w = TRITON.dequantize(*operands(packed), *shape(packed), dtype)
    assert w.dtype == dtype and torch.equal(w, reference.dequantize(packed, dtype))


def test_dequantize_mixed_widths():
    packed = pack_weight(mixed_weight(permuted=True))
    w = TRITON.dequantize(*operands(packed), *shape(packed), torch.float32)
    assert torch.equal(w, reference.dequantize(packed))


@pytest.mark.parametrize(
    ("bits", "cols", "group", "step"),
    [
        (3, 64, 16, 16),
        (7, 64, 16, 16),
        (3, 128, 32, 32),
        (7, 64, 32, 32),
        (8, 64, 32, 32),
        (6, 192, 96, 32),
        (5, 128, 64, 64),
    ]
    + [(2, 256, 128, 64), (1, 384, 192, 64)],
)
def test_groups_that_are_fast(bits, cols, group, step):
    packed = pack_weight(random_weight(40, cols, bits, group))
    assert launch.work_step(packed.layout) == step
    x = torch.randn(3, packed.layout.in_features).half()
    check(linear(x, packed), x, packed)
    hot = torch.zeros(2, packed.layout.in_features).half()
    hot[0, group - 1] = hot[1, group] = 1
    assert torch.equal(linear(hot, packed).T, reference.dequantize(packed, torch.float16)[:, [group - 1, group]])


@pytest.mark.parametrize(("cols", "group", "dtype"), [(86, 43, torch.float16), (24, 8, torch.bfloat16)])
def test_groups_that_are_slow(cols, group, dtype):
    packed = pack_weight(random_weight(33, cols, 5, group, "int", permuted=True))
    assert launch.work_step(packed.layout) == 0
    x, bias = torch.randn(4, cols).to(dtype), torch.randn(33)
    check(linear(x, packed, bias), x, packed, bias)
    y = linear(torch.eye(cols).to(dtype)[:9], packed)
    assert torch.equal(y.T, reference.dequantize(packed, dtype)[:, :9])


@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize("step", [16, 32, 64])
def test_both_orders_of_columns(monkeypatch, natural, step):
    monkeypatch.setattr(configs, "natural_columns", lambda arch, version: natural)
    packed = pack_weight(random_weight(64, 2 * step, 7, step, "int", permuted=True))
    x = torch.eye(2 * step)[::3].half()
    assert torch.equal(linear(x, packed).T, reference.dequantize(packed, torch.float16)[:, ::3])


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (63, 65), (65, 63), (130, 100)])
def test_shapes_that_fill_no_tile(rows, cols):
    packed = pack_weight(random_weight(rows, cols, 6, -1, "float", "float32", permuted=True))
    x, bias = torch.randn(2, cols).half(), torch.randn(rows).half()
    check(linear(x, packed, bias), x, packed, bias)


@pytest.mark.parametrize("tokens", [0, 1, 17, 33])
def test_numbers_of_tokens(monkeypatch, tokens):
    monkeypatch.setattr(configs, "choose", lambda *_: replace(ONE_PROGRAM, block_m=16))
    packed = pack_weight(random_weight(64, 64, 4, 64))
    x = torch.randn(tokens, 64).half()
    y = linear(x, packed)
    assert y.shape == (tokens, 64)
    check(y, x, packed)


def test_many_tokens_through_a_dense_weight(monkeypatch):
    monkeypatch.setattr(configs, "DENSE_ABOVE", 4)
    packed = pack_weight(random_weight(70, 128, 4, 64, permuted=True))
    x, bias = torch.randn(5, 128).half(), torch.randn(70)
    y = linear(x, packed, bias)
    w = reference.dequantize(packed, torch.float16)
    # The weight and the bias are rounded to fp16 first; then fp32 sums in any order and one rounding, as torch's own.
    expected = torch.nn.functional.linear(x.double(), w.double(), bias.half().double())
    bound = (x.double().abs() @ w.double().abs().T + bias.abs()) * 134 * 2**-24 + expected.abs() * 2**-10
    assert ((y.double() - expected).abs() <= bound).all()


def test_mixed_widths_in_one_launch():
    """A packed weight of seven segments. Every backend on the same weights: agreement.py."""
    segments = tuple(replace(s, group_size=64) if s.group_size == 8 else s for s in MIXED_SEGMENTS)
    packed = pack_weight(weight_of(segments, permuted=True))
    assert launch.work_step(packed.layout) == 16
    x, bias = torch.randn(3, 320).half(), torch.randn(200)
    check(linear(x, packed, bias), x, packed, bias)


def test_mixed_widths_of_which_one_is_slow():
    packed = pack_weight(mixed_weight())
    x, bias = torch.randn(3, 320).bfloat16(), torch.randn(200).bfloat16()
    check(linear(x, packed, bias), x, packed, bias)


def weight_of(segments, permuted=False):
    blocks = tuple(
        (s.n0, s.k0, random_block(s.rows, s.cols, s.bits, s.group_size, s.zero, seed=i)) for i, s in enumerate(segments)
    )
    return QuantizedWeight(blocks, random_perm(segments[-1].k1) if permuted else None)


def test_a_product_that_is_not_split_is_one_launch(monkeypatch):
    """Two programs for four blocks of tokens: each takes all of K."""
    monkeypatch.setattr(configs, "choose", lambda *_: Config(16, num_warps=1, programs_per_unit=1))
    monkeypatch.setattr(launch, "reduce_kernel", None)
    packed = pack_weight(random_weight(64, 128, 4, 64))
    x, bias = torch.randn(50, 128).half(), torch.randn(64)
    check(linear(x, packed, bias), x, packed, bias)


def test_tokens_are_taken_in_turns_where_their_sums_would_be_many(monkeypatch):
    monkeypatch.setattr(configs, "choose", lambda *_: Config(16, num_warps=1, programs_per_unit=2))
    packed = pack_weight(weight_of((Segment(0, 64, 0, 64, 2, 64, "int"), Segment(0, 64, 64, 128, 3, 64, "int"))))
    monkeypatch.setattr(work, "MOST_PARTIAL_BYTES", 2 * 64 * 16 * 4)  # two parts of one block of tokens
    made = []
    monkeypatch.setattr(launch, "_launch", lambda *args, run=launch._launch: (made.append(len(args[0])), run(*args)))
    x, bias = torch.randn(35, 128).half(), torch.randn(64)
    check(linear(x, packed, bias), x, packed, bias)
    assert made == [16, 16, 3]


def test_parts_are_added_in_order(monkeypatch):
    """Any number of programs, any number of warps: within the bound, one-hot bit for bit, and the same bits twice."""
    packed = pack_weight(random_weight(130, 192, 2, 64, "int"))
    x, bias = torch.cat([torch.randn(2, 192), torch.eye(192)[[0, 70, 191]]]).half(), torch.randn(130)
    for warps, programs in ((2, 2), (1, 4)):
        config = Config(16, num_warps=warps, programs_per_unit=programs)
        monkeypatch.setattr(configs, "choose", lambda *_, config=config: config)
        y = linear(x, packed, bias)
        check(y, x, packed, bias)
        assert torch.equal(y, linear(x, packed, bias))
        hot = linear(x[2:], packed)
        assert torch.equal(hot.T, reference.dequantize(packed, torch.float16)[:, [0, 70, 191]])


def stacked(rows, cols, widths, permuted=False):
    perm = random_perm(cols) if permuted else None
    experts = [
        QuantizedWeight(random_weight(rows, cols, bits, group, zero, seed=seed).blocks, perm)
        for seed, (bits, group, zero) in enumerate(widths)
    ]
    return pack_weight(QuantizedWeight.stack(experts))


GROUPED = [
    ([3, 0, 1, 5], [(3, 64, "int"), (6, 32, "none"), (2, 64, "int"), (4, 32, "int")], torch.float16),
    ([0, 9, 0, 0], [(3, 64, "float"), (6, 16, "none"), (1, 64, "float"), (4, 4, "float")], torch.bfloat16),
    ([0, 0, 0, 0], [(8, 64, "int")] * 4, torch.float16),
    ([20, 1, 0, 17], [(8, 64, "none"), (5, 64, "int"), (7, 64, "int"), (4, 64, "int")], torch.bfloat16),
]


@pytest.mark.parametrize(("counts", "widths", "dtype"), GROUPED, ids=lambda v: str(v)[:20])
def test_experts(monkeypatch, counts, widths, dtype):
    monkeypatch.setattr(configs, "choose", lambda *_: replace(ONE_PROGRAM, block_m=16, programs_per_unit=4))
    packed = stacked(70, 64, widths, permuted=True)
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    x, bias = torch.randn(sum(counts), 64).to(dtype), torch.randn(280).to(dtype)
    y = TRITON.grouped(x, *operands(packed), bias, offsets, *shape(packed))
    assert y.shape == (sum(counts), 70)
    for e, (a, b) in enumerate(itertools.pairwise(offsets.tolist())):
        check(y[a:b], x[a:b], packed, bias, slice(70 * e, 70 * e + 70))


def test_strided_rows_and_leading_dimensions():
    packed = pack_weight(random_weight(10, 64, 4, 64))
    wide = torch.randn(2, 3, 100).half()
    x = wide[..., 7:71]
    assert torch.equal(linear(x, packed), linear(x.contiguous(), packed))
    assert torch.equal(linear(x[0].T.contiguous().T, packed), linear(x[0].contiguous(), packed))


def test_a_layer_runs_on_it_and_has_gradients():
    packed = pack_weight(random_weight(10, 64, 4, 64))
    layer = MixedLinear.from_packed(packed, torch.randn(10).half(), backend="triton")
    assert layer.backend == "triton" and torch.equal(layer.dequantize(), reference.dequantize(packed))
    x = torch.randn(2, 64).half().requires_grad_()
    layer(x).sum().backward()
    expected = torch.ones(2, 10).half() @ reference.dequantize(packed, torch.float16)
    assert torch.equal(x.grad, expected)


def test_opcheck():
    packed = pack_weight(random_weight(10, 64, 4, 64, permuted=True))
    x, bias = torch.randn(2, 64).half(), torch.randn(10)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.mpq_triton.linear.default, (x, *operands(packed), bias, *shape(packed)), test_utils=tests
    )


REFUSALS = [
    ({"x": torch.randn(2, 64)}, "x must be float16 or bfloat16"),
    ({"x": torch.randn(2, 63).half()}, r"x must be \(..., in_features=64\)"),
    ({"qweight": torch.zeros(5, dtype=torch.int32)}, r"qweight must be int32 \[512\], not int32 \[5\]"),
    ({"scales": torch.ones(63).half()}, r"scales must be float16 \[64\]"),
    ({"scales": torch.ones(128).half()[::2]}, "scales must be contiguous"),
    ({"zeros": None}, "zeros is missing"),
    ({"perm": torch.zeros(63, dtype=torch.int32)}, r"perm must be int32 \[64\]"),
    ({"bias": torch.zeros(9)}, "out_features=10 elements"),
    ({"bias": torch.zeros(10, dtype=torch.float64)}, "bias must be float32"),
    ({"segments": [0, 10, 0, 64, 4, 64]}, "7 integers"),
    ({"segments": [0, 10, 0, 64, 4, 64, 5]}, "unknown kind of zeros"),
    ({"segments": [0, 9, 0, 64, 4, 64, 2]}, "segments cover 9 of 10 rows"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSALS, ids=[words[:30] for _, words in REFUSALS])
def test_refusals(changes, words):
    packed = pack_weight(random_weight(10, 64, 4, 64))
    args = {
        "x": torch.randn(2, 64).half(), "qweight": packed.qweight, "scales": packed.scales, "zeros": packed.zeros,
        "perm": None, "bias": None, "segments": packed.layout.segment_ints(), "out_features": 10, "in_features": 64,
    }  # fmt: skip
    with pytest.raises(FormatError, match=words):
        TRITON.linear(*(args | changes).values())


def test_offsets_are_checked():
    packed = stacked(10, 64, [(4, 64, "int")] * 2)
    x = torch.randn(2, 64).half()
    for offsets, words in (
        (torch.tensor([0, 1, 2]), "offsets must be int32"),
        (torch.tensor([0, 0, 1, 2], dtype=torch.int32), "do not share out among 3 experts"),
    ):
        with pytest.raises(FormatError, match=words):
            TRITON.grouped(x, *operands(packed), None, offsets, *shape(packed))


def test_a_band_lies_in_one_expert():
    packed = pack_weight(weight_of((Segment(0, 20, 0, 64, 4, 64, "int"),)))
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    with pytest.raises(FormatError, match="lie in two experts of 10 rows"):
        TRITON.grouped(torch.randn(2, 64).half(), *operands(packed), None, offsets, *shape(packed))
