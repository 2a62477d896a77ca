"""The CUDA kernels' own sources, run by the host simulator, against the reference.

Every width, group, zero, scale, shape and cut of the work; one-hot inputs bit for bit; outputs NaN before the call,
shared memory and workspace undefined.
"""

import ctypes
import itertools

import pytest
import torch

from mpq_kernels.format import reference
from mpq_kernels.format.codes import LAYOUT_ID
from mpq_kernels.format.weights import QuantizedBlock, QuantizedWeight
from mpq_kernels.format.words import pack_weight
from tests.backends.cuda import simulated
from tests.backends.cuda.simulated import H200, NARROW, SMALL, SimulatorError
from tests.made.weights import BITS, mixed_weight, random_block, random_perm, random_weight, support_matrix

X_DTYPES = (torch.float16, torch.bfloat16)
SIZES = (1, 63, 65, 172, 640)


def tokens(m, k, dtype=torch.float16, seed=0):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(weight, x, bias=None, **how):
    """y within the bound of fp32 sums in any order and one rounding."""
    y = simulated.linear(pack_weight(weight), x, bias, **how)
    error = (y.double() - reference.linear(x, weight, bias)).abs()
    assert (error <= reference.error_bound(x, weight, bias)).all()  # false for NaN too
    return y


@pytest.mark.parametrize(("bits", "zero", "scale_dtype"), support_matrix())
@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
def test_one_hot_tokens_return_the_weights_bit_for_bit(bits, zero, scale_dtype, dtype):
    weight = random_weight(70, 192, bits, 64, zero, scale_dtype)
    columns = [0, 1, 9, 17, 63, 64, 100, 191]
    x = torch.zeros(len(columns), 192, dtype=dtype)
    x[torch.arange(len(columns)), columns] = 1
    wanted = reference.dequantize(weight)[:, columns].T.to(dtype)
    for m in (8, 3):
        assert torch.equal(simulated.linear(pack_weight(weight), x[:m]), wanted[:m])
    many = x.repeat(5, 1)
    assert torch.equal(simulated.linear(pack_weight(weight), many), wanted.repeat(5, 1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [0, 1, 2, 7, 9, 16, 17, 32, 33, 64, 70])
def test_any_number_of_tokens(bits, m):
    weight = random_weight(130, 256, bits, 32 if bits % 2 else 128)
    for dtype in X_DTYPES:
        check(weight, tokens(m, 256, dtype), torch.randn(130, generator=torch.Generator().manual_seed(1)).to(dtype))


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 192, 384, 48, 24, 8, 3, 1])
@pytest.mark.parametrize("zero", ["none", "int", "float"])
def test_any_group(group_size, zero):
    for bits, scale_dtype in ((2, "float16"), (3, "float32"), (5, "bfloat16"), (8, "float16")):
        for m in (3, 20) if bits % 3 else (3, 50):
            check(random_weight(100, 384, bits, group_size, zero, scale_dtype), tokens(m, 384))


@pytest.mark.parametrize(("n", "k"), list(itertools.product(SIZES, SIZES)))
def test_any_shape(n, k):
    for bits, m, dtype in ((1 + (n + k) % 8, 1, X_DTYPES[0]), (1 + (n * 3 + k) % 8, 11, X_DTYPES[1])):
        check(random_weight(n, k, bits, seed=n + k), tokens(m, k, dtype), torch.randn(n))
    check(random_weight(n, k, 1 + (n + k * 5) % 8, seed=n + k), tokens(18 + n % 40, k))
    if k % 4 == 0:
        check(random_weight(n, k, 4, 4, seed=k), tokens(2, k))


@pytest.mark.parametrize("m", [1, 4, 12, 40])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32", "bfloat16"])
def test_segments_of_all_kinds_in_one_weight(m, permuted, scale_dtype):
    check(mixed_weight(scale_dtype, permuted), tokens(m, 320), torch.randn(200).half())


def bands(rows, widths, groups, k=256):
    """Row bands of several column segments: more of them than kernel parameters hold."""
    blocks, cut = [], k // len(groups)
    for band, n in enumerate(rows):
        for i, group in enumerate(groups):
            bits = widths[(band + i) % len(widths)]
            blocks.append((sum(rows[:band]), cut * i, random_block(n, cut, bits, group, "int", "float16", band + i)))
    return QuantizedWeight(tuple(blocks), None)


@pytest.mark.parametrize("device", [SMALL, NARROW, H200], ids=["small", "narrow", "h200"])
@pytest.mark.parametrize("m", [1, 10, 20])
def test_tables_that_do_not_fit_into_parameters(device, m):
    check(bands([20] * 16, BITS, (64, 32, 16, 64)), tokens(m, 256), device=device)
    check(bands([3] * 16, (3, 7), (64, 8)), tokens(m, 256), device=device)


@pytest.mark.parametrize("device", [SMALL, NARROW, H200], ids=["small", "narrow", "h200"])
@pytest.mark.parametrize("order", [(0, 0), (1, 0), (2, 5), (2, 6)], ids=["forward", "reverse", "random5", "random6"])
@pytest.mark.parametrize("interleave", [0, 1])
def test_the_order_of_blocks_and_warps_changes_no_bit(device, order, interleave):
    weight = bands([70, 140], (4, 3, 8), (64, 128), 384)
    for m in (1, 14, 20, 35):
        x = tokens(m, 384, X_DTYPES[m % 2])
        plain = simulated.linear(pack_weight(weight), x, device=device)
        assert torch.equal(check(weight, x, device=device, order=order, interleave=interleave), plain)


@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 11, 37, 132, 500])
def test_any_number_of_multiprocessors(multiprocessors):
    device = simulated.Device(0, 90, multiprocessors, 232448)
    weight = bands([64, 320, 1], (2, 5), (64, 128), 640)
    for m in (1, 7, 13, 33, 100):
        check(weight, tokens(m, 640), device=device, interleave=1)


@pytest.mark.parametrize("shared_bytes", [99 * 1024, 163 * 1024])
def test_any_amount_of_shared_memory(shared_bytes):
    device = simulated.Device(0, 80, 3, shared_bytes)
    for bits, group, scale_dtype, zero in (
        (8, 64, "float32", "float"),
        (2, 16, "float32", "float"),
        (4, 128, "float16", "int"),
    ):
        weight = random_weight(70, 1024, bits, group, zero, scale_dtype)
        for m in (1, 16, 20, 33):
            check(weight, tokens(m, 1024), device=device)


@pytest.mark.parametrize("m", [6, 20])
@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
def test_rows_of_x_may_lie_apart_and_anywhere(dtype, m):
    weight = random_weight(70, 320, 3, 32)
    plain = simulated.linear(pack_weight(weight), tokens(m, 320, dtype))
    for offset, stride in ((0, 320), (1, 323), (3, 600), (8, 328)):
        space = torch.full((m * stride + offset,), float("nan"), dtype=dtype)
        x = torch.as_strided(space, (m, 320), (stride, 1), offset)
        x.copy_(tokens(m, 320, dtype))
        assert torch.equal(simulated.linear(pack_weight(weight), x), plain)
    once = tokens(1, 320, dtype).expand(4, 320)  # stride 0
    assert torch.equal(simulated.linear(pack_weight(weight), once), plain[:1].expand(4, 70))


@pytest.mark.parametrize("m", [6, 40])
def test_rows_of_y_may_lie_apart(m):
    weight = random_weight(70, 320, 3, 32)
    x = tokens(m, 320)
    assert torch.equal(
        simulated.linear(pack_weight(weight), x, row_stride=99), simulated.linear(pack_weight(weight), x)
    )


@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_silu_and_product_are_applied_to_x(dtype, permuted):
    for rows, group_size, m in ((100, 64, 5), (20, 5, 5), (100, 64, 20)):
        x, gate = tokens(m, 320, dtype), tokens(m, 320, dtype, seed=3)
        hidden = torch.nn.functional.silu(gate) * x
        weight = random_weight(rows, 320, 4, group_size, permuted=permuted)
        y = simulated.linear(pack_weight(weight), x, gate=gate)
        # exp may be off by an ulp of fp32, so silu(gate) and the product by one rounding of x's dtype each.
        moved = reference.linear(hidden.abs(), dequantized_magnitude(weight)) * 2 * torch.finfo(dtype).eps
        error = (y.double() - reference.linear(hidden, weight)).abs()
        assert (error <= reference.error_bound(hidden, weight) + moved).all()


def dequantized_magnitude(weight):
    """|W| as a packed weight of one bit: codes 1, scales |W|."""
    dense = reference.dequantize(weight).abs()
    ones = torch.ones_like(dense, dtype=torch.uint8)
    return QuantizedWeight.uniform(QuantizedBlock(1, ones, dense, torch.zeros_like(ones)))


def test_inputs_near_the_ends_of_their_range():
    weight = random_weight(70, 128, 4, 64)
    for dtype, values in ((torch.float16, (6e-8, 40.0)), (torch.bfloat16, (1e-18, 1e14))):
        for value in values:
            check(weight, (tokens(3, 128).float() * value).clamp(-value, value).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_dequantize_is_the_reference_bit_for_bit(dtype, permuted):
    for weight in (
        mixed_weight(permuted=permuted),
        bands([20] * 16, BITS, (64, 32, 16, 64)),
        random_weight(65, 172, 3, 43),
    ):
        assert torch.equal(simulated.dequantize(pack_weight(weight), dtype), reference.dequantize(weight, dtype))


@pytest.mark.parametrize(("bits", "zero", "scale_dtype"), support_matrix())
def test_dequantize_every_kind(bits, zero, scale_dtype):
    weight = random_weight(65, 96, bits, 24, zero, scale_dtype)
    assert torch.equal(simulated.dequantize(pack_weight(weight), torch.float32), reference.dequantize(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_embedding_is_the_reference_bit_for_bit(dtype, permuted):
    for weight in (
        mixed_weight(permuted=permuted),
        bands([20] * 16, BITS, (64, 32, 16, 64)),  # more bands than one launch takes
        random_weight(65, 172, 3, 43),
    ):
        dense = reference.dequantize(weight, dtype)
        ids = torch.tensor([0, len(dense) - 1, 64, 7, 7, 33, 18])
        assert torch.equal(simulated.embedding(pack_weight(weight), ids, dtype), dense[ids])


@pytest.mark.parametrize(("bits", "zero", "scale_dtype"), support_matrix())
def test_embedding_every_kind(bits, zero, scale_dtype):
    weight, ids = random_weight(65, 96, bits, 24, zero, scale_dtype), torch.arange(64, -1, -5)
    found = simulated.embedding(pack_weight(weight), ids, torch.float32)
    assert torch.equal(found, reference.dequantize(weight)[ids])


@pytest.mark.parametrize("bad", [-1, 65, 2**40])
def test_an_id_outside_stops_the_kernel(bad):
    with pytest.raises(simulated.SimulatorError, match="an id is outside of the rows"):
        simulated.embedding(pack_weight(random_weight(65, 64, 4, 64)), torch.tensor([1, bad]), torch.float32)


def experts(count, rows, k, seed):
    """Stacked experts, each of two bands of its own widths."""
    blocks = []
    for e in range(count):
        first = rows // 2 + 3
        for n0, n, bits, group in ((0, first, 1 + (e + seed) % 8, 64), (first, rows - first, 1 + (e + 3) % 8, 32)):
            blocks.append((e * rows + n0, 0, random_block(n, k, bits, group, "int", "float16", e + n0)))
    return QuantizedWeight(tuple(blocks), random_perm(k, seed) if seed % 2 else None)


EXPERT_COUNTS = ([0, 3, 0, 1, 9], [1, 0, 0, 0, 0], [0, 0, 0, 0, 70], [20, 17, 33, 8, 16], [0] * 5)


@pytest.mark.parametrize("counts", [*EXPERT_COUNTS, [7 * i % 3 for i in range(70)]], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_experts_of_different_widths_in_one_launch(counts, seed):
    rows, k = 72, 192
    weight = experts(len(counts), rows, k, seed)
    x, bias = tokens(sum(counts), k, X_DTYPES[seed]), torch.randn(rows * len(counts)).to(X_DTYPES[seed])
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    packed = pack_weight(weight)
    for order in ((0, 0), (2, 3)):
        y = simulated.grouped(packed, x, offsets, len(counts), bias, order=order)
        assert y.shape == (sum(counts), rows)
        for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
            part = slice(e * rows, (e + 1) * rows)
            wanted = reference.linear(x[begin:end], weight, bias)[:, part]
            bound = reference.error_bound(x[begin:end], weight, bias)[:, part]
            assert ((y[begin:end].double() - wanted).abs() <= bound).all()


def test_the_library_knows_its_layout():
    assert simulated.library().mpq_layout_id().decode() == LAYOUT_ID


def check_refused(change, status, text):
    """mpq_linear with one argument changed is refused before anything runs."""
    lib = simulated.library()
    lib.mpq_sim_reset()
    place = simulated.Packed(pack_weight(random_weight(70, 128, 4, 64)))
    x, y = tokens(2, 128), torch.zeros(2, 70, dtype=torch.float16)
    counters = torch.zeros(1024, dtype=torch.uint8)
    args = simulated.LinearArgs(place.weight, x.data_ptr(), None, 128, 2, None, y.data_ptr(), 70, counters.data_ptr())
    args.x_dtype = 1
    device = simulated.Device(0, 90, 4, 232448)
    change(args, device)
    got = lib.mpq_linear(ctypes.byref(args), ctypes.byref(device), None)
    assert got == status and text in lib.mpq_error_text(got).decode()
    assert not y.any()


def setter(path, value):
    def change(args, device):
        target = {"args": args, "device": device, "weight": args.weight, "segment": args.weight.segments[0]}[path[0]]
        setattr(target, path[1], value)

    return change


REFUSALS = {
    "no x": (("args", "x"), None, 1, "null"),
    "no counters": (("args", "counters"), None, 1, "null"),
    "no scales": (("weight", "scales"), None, 1, "null"),
    "no zeros": (("weight", "zeros"), None, 1, "null"),
    "no columns": (("weight", "in_features"), 0, 2, "positive"),
    "tokens": (("args", "tokens"), -1, 2, "negative"),
    "fp32 x": (("args", "x_dtype"), 0, 3, "fp16 or bf16"),
    "scale dtype": (("weight", "scale_dtype"), 7, 3, "scales"),
    "bits": (("segment", "bits"), 9, 4, "1..8"),
    "group": (("segment", "group_size"), 60, 4, "group_size"),
    "cover": (("weight", "out_features"), 71, 5, "tile the weight"),
    "alignment": (("weight", "qweight"), 8, 6, "16 bytes"),
    "stride of y": (("args", "y_row_stride"), 69, 7, "y_row_stride"),
    "old device": (("device", "capability"), 75, 9, "8.0"),
    "small device": (("device", "shared_bytes"), 48 * 1024, 9, "99 KB"),
    "size": (("weight", "in_features"), 2**31, 10, "2^31"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_come_before_any_work(name):
    path, value, status, text = REFUSALS[name]
    check_refused(setter(path, value), status, text)


def test_a_short_workspace_is_refused():
    lib = simulated.library()
    lib.mpq_sim_reset()
    place = simulated.Packed(pack_weight(random_weight(70, 2048, 4, 64)))
    x, y, counters = tokens(2, 2048), torch.zeros(2, 70, dtype=torch.float16), torch.zeros(1024, dtype=torch.uint8)
    args = simulated.LinearArgs(place.weight, x.data_ptr(), None, 2048, 2, None, y.data_ptr(), 70, counters.data_ptr())
    args.x_dtype = 1
    size = ctypes.c_size_t()
    assert lib.mpq_workspace_size(ctypes.byref(args), ctypes.byref(H200), ctypes.byref(size)) == 0 and size.value > 0
    args.workspace, args.workspace_bytes = counters.data_ptr(), size.value - 1
    status = lib.mpq_linear(ctypes.byref(args), ctypes.byref(H200), None)
    assert status == 8 and b"mpq_workspace_size" in lib.mpq_error_text(status)


def test_experts_are_refused_where_bands_or_groups_do_not_fit():
    x, offsets = tokens(2, 192), torch.tensor([0, 1, 2], dtype=torch.int32)
    for weight in (bands([30, 40, 30], (4,), (64,), 192), random_weight(100, 192, 4, 24)):
        with pytest.raises(SimulatorError, match="experts") as caught:
            simulated.grouped(pack_weight(weight), x, offsets, 2)
        assert caught.value.status == 11
