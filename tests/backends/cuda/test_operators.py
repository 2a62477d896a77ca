"""The operators that csrc/torch/cuda_ops.cpp registers, on tensors of the CPU: the same file, over the simulator."""

import itertools

import pytest
import torch

from mpq_kernels.backends import cuda
from mpq_kernels.format import reference
from mpq_kernels.format.weights import QuantizedWeight
from mpq_kernels.format.words import pack_weight
from tests.backends.cuda import simulated
from tests.made.weights import mixed_weight, random_block, random_weight


def arguments(weight, bias=None):
    """What follows x in the operators' schema."""
    packed = pack_weight(weight)
    layout = packed.layout
    tensors = map(simulated.aligned, (packed.qweight, packed.scales, packed.zeros, packed.perm))
    return [*tensors, bias, layout.segment_ints(), layout.out_features, layout.in_features]


@pytest.fixture
def ops():
    return simulated.operators()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(320,), (1, 320), (2, 3, 320), (40, 320), (0, 320)])
def test_linear(ops, dtype, shape):
    weight, bias = mixed_weight(permuted=True), torch.randn(200)
    x = torch.randn(*shape).to(dtype)
    y = ops.linear(x, *arguments(weight, bias))
    assert y.shape == (*shape[:-1], 200) and y.dtype == dtype
    wanted, bound = reference.linear(x, weight, bias), reference.error_bound(x, weight, bias)
    assert ((y.double() - wanted).abs() <= bound).all()


def test_rows_that_lie_apart_are_read_where_they_are(ops):
    rest = arguments(random_weight(70, 320, 3, 32))
    space = torch.randn(6, 1000).half()
    x = space[:, 8:328]
    assert torch.equal(ops.linear(x, *rest), ops.linear(x.contiguous(), *rest))
    turned = torch.randn(320, 6).half().t()
    assert torch.equal(ops.linear(turned, *rest), ops.linear(turned.contiguous(), *rest))


def test_many_tokens_take_the_dense_product(ops):
    weight, bias = random_weight(130, 128, 4, 64), torch.randn(130)
    x = torch.randn(129, 128).half()
    y = ops.linear(x, *arguments(weight, bias))
    dense = torch.nn.functional.linear(x, reference.dequantize(weight, torch.float16), bias.half())
    assert torch.equal(y, dense)
    few = ops.linear(x[:128], *arguments(weight, bias))
    bound = reference.error_bound(x[:128], weight, bias)
    assert ((few.double() - reference.linear(x[:128], weight, bias)).abs() <= bound).all()


def test_calls_one_after_the_other_share_counters(ops):
    weight = random_weight(200, 640, 5, 64)
    rest = arguments(weight)
    x = torch.randn(5, 640).half()
    first = ops.linear(x, *rest)
    for _ in range(3):
        assert torch.equal(ops.linear(x, *rest), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dequantize(ops, dtype):
    weight = mixed_weight(permuted=True)
    rest = arguments(weight)
    assert torch.equal(ops.dequantize(*rest[:4], *rest[5:], dtype), reference.dequantize(weight, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_embedding(ops, dtype):
    weight = mixed_weight(permuted=True)
    rest = arguments(weight)
    dense = reference.dequantize(weight, dtype)
    for ids in (
        torch.tensor([[3, 199, 0], [70, 69, 3]]),
        torch.tensor(5, dtype=torch.int32),
        torch.zeros(0, dtype=torch.long),
    ):
        assert torch.equal(ops.embedding(ids, *rest[:4], *rest[5:], dtype), dense[ids.long()])


def test_grouped_linear(ops):
    rows, k, counts = 72, 192, (0, 3, 9, 0, 1)
    blocks = [(e * rows, 0, random_block(rows, k, 1 + e, 64, "int", "float16", e)) for e in range(5)]
    weight, bias = QuantizedWeight(tuple(blocks), None), torch.randn(360).half()
    x = torch.randn(sum(counts), k).half()
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    rest = arguments(weight, bias)
    y = ops.grouped_linear(x, *rest[:5], offsets, *rest[5:])
    assert y.shape == (13, rows)
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        part = slice(e * rows, (e + 1) * rows)
        wanted = reference.linear(x[begin:end], weight, bias)[:, part]
        assert (
            (y[begin:end].double() - wanted).abs() <= reference.error_bound(x[begin:end], weight, bias)[:, part]
        ).all()


def test_silu_mul_linear(ops):
    weight = random_weight(100, 320, 4, 64)
    gate, up = torch.randn(5, 320).bfloat16(), torch.randn(5, 640).bfloat16()[:, ::2]
    y = ops.silu_mul_linear(gate, up, *arguments(weight))
    hidden = torch.nn.functional.silu(gate) * up
    wanted = reference.linear(hidden, weight)
    assert (y.double() - wanted).norm() <= 2**-8 * wanted.norm()


def test_many_tokens_of_silu_mul_take_the_dense_product(ops):
    weight, bias = random_weight(130, 128, 4, 64), torch.randn(130)
    gate, up = torch.randn(2, 150, 128).half(), torch.randn(2, 150, 128).half()
    y = ops.silu_mul_linear(gate, up, *arguments(weight, bias))
    hidden = torch.nn.functional.silu(gate) * up
    dense = torch.nn.functional.linear(hidden, reference.dequantize(weight, torch.float16), bias.half())
    assert torch.equal(y, dense)


def changed(index, value):
    rest = arguments(random_weight(70, 320, 3, 32))
    rest[index] = value(rest[index]) if callable(value) else value
    return rest


REFUSALS = {
    "qweight too short": (0, lambda t: t[:-1], "qweight must have"),
    "qweight of another dtype": (0, lambda t: t.float(), "qweight has the wrong dtype"),
    "scales too short": (1, lambda t: t[:-1], "scales must have"),
    "no zeros": (2, None, "segments name zeros, but none were given"),
    "zeros of another dtype": (2, lambda t: t.half(), "integer zeros must be uint8"),
    "perm too short": (3, torch.zeros(3, dtype=torch.int32), "perm must have in_features=320"),
    "bias too short": (4, torch.zeros(69), "out_features=70"),
    "half a segment": (5, lambda s: s[:-1], "7 integers each"),
    "group size": (5, lambda s: [*s[:5], 0, s[6]], "group_size=0 does not divide"),
    "bits": (5, lambda s: [*s[:4], 9, *s[5:]], "bits=9 is not 1..8"),
    "rows": (6, 71, "do not cover 71 x 320"),
    "columns": (7, 0, "must be 1"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(ops, name):
    index, value, text = REFUSALS[name]
    with pytest.raises(RuntimeError, match=text):
        ops.linear(torch.zeros(2, 320).half(), *changed(index, value))


def test_refusals_of_x(ops):
    rest = arguments(random_weight(70, 320, 3, 32))
    with pytest.raises(RuntimeError, match="float16 or bfloat16 on CUDA"):
        ops.linear(torch.zeros(2, 320), *rest)
    with pytest.raises(RuntimeError, match="in_features=320"):
        ops.linear(torch.zeros(2, 321).half(), *rest)
    with pytest.raises(RuntimeError, match="one shape, dtype and device"):
        ops.silu_mul_linear(torch.zeros(2, 320).half(), torch.zeros(1, 320).half(), *rest)
    with pytest.raises(RuntimeError, match="do not share out among 3 experts"):
        ops.grouped_linear(torch.zeros(2, 320).half(), *rest[:5], torch.zeros(4, dtype=torch.int32), *rest[5:])


def test_a_driver_serves_every_runtime_of_its_major_version_and_older_ones():
    for runtime, driver in ((13000, 13000), (13010, 13000), (12040, 13000), (12090, 12020), (0, 0)):
        assert cuda._why_not_driver(runtime, driver) is None
    text = cuda._why_not_driver(13000, 12080)
    assert "built with CUDA 13.0" in text and "serves CUDA 12.8" in text and "nvcc 12.x" in text


def test_the_reason_without_a_device_is_in_words():
    reason = cuda.why_unavailable()
    if torch.cuda.is_available():
        pytest.skip("there is a device; tests/backends/cuda/test_device.py says whether the kernels run on it")
    assert reason and ("no CUDA device" in reason or "without CUDA" in reason or "no _cuda.so" in reason)
    with pytest.raises(cuda.UnsupportedError, match="no CUDA kernels to warm up"):
        cuda.warmup()
