"""libmpq_cpu against torch.ops.mpq, bit for bit, and what it refuses; after an error nothing has been written."""

import itertools
import threading
from ctypes import byref, c_size_t

import pytest
import torch

import mpq_kernels.backends.ops  # noqa: F401  (registers the operators)
from mpq_kernels.format.codes import LAYOUT_ID
from mpq_kernels.format.words import pack_weight
from tests.made import c_library as c
from tests.made.weights import X_DTYPES, expert_case, mixed_weight, random_weight, support_matrix


def operands(packed):
    return packed.qweight, packed.scales, packed.zeros, packed.perm


def shape(packed):
    return packed.layout.segment_ints(), packed.layout.out_features, packed.layout.in_features


def same_bits(a, b):
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integers), b.contiguous().view(integers))


def check_all(packed, cpu_exact, cpu_int8, dtype=torch.bfloat16):
    """Every operation on one weight."""
    n, k = packed.layout.out_features, packed.layout.in_features
    bias = torch.randn(n)
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, k).to(dtype)
        for cpu, product in ((cpu_exact, torch.ops.mpq.linear), (cpu_int8, torch.ops.mpq.linear_int8)):
            assert same_bits(c.linear(x, packed, cpu, bias), product(x, *operands(packed), bias, *shape(packed)))
    wanted = torch.ops.mpq.dequantize(*operands(packed), *shape(packed), dtype)
    assert same_bits(c.dequantize(packed, dtype, cpu_exact), wanted)
    ids = torch.randint(0, n, (9,))
    assert same_bits(c.embedding(ids, packed, dtype, cpu_exact), wanted[ids])


@pytest.mark.parametrize(("bits", "zero", "scale_dtype"), support_matrix())
def test_every_kind_of_weight(bits, zero, scale_dtype):
    weight = random_weight(70, 192, bits, 64, zero, scale_dtype, permuted=bits % 2 == 0)
    check_all(pack_weight(weight), c.query(), c.query(int8=True))


@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
def test_every_instruction_set(int8_isa, dtype):
    check_all(pack_weight(mixed_weight(permuted=True)), c.query(int8_isa), c.query(int8_isa, int8=True), dtype)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_change_nothing(threads):
    """The weight is large enough for work to be shared."""
    packed, x = pack_weight(random_weight(1030, 1024, 3, 64)), torch.randn(3, 1024)
    pool = c.Pool(threads)
    try:
        for int8 in (False, True):
            cpu = pool.give(c.query(int8=int8))
            assert same_bits(c.linear(x, packed, cpu), c.linear(x, packed, c.query(int8=int8)))
        wanted = c.dequantize(packed, torch.float32, c.query())
        assert same_bits(c.dequantize(packed, torch.float32, pool.give(c.query())), wanted)
    finally:
        pool.close()


def test_calls_of_several_threads_share_a_pool():
    packed, x = pack_weight(random_weight(1030, 1024, 3, 64)), torch.randn(1, 1024)
    pool, results = c.Pool(2), []
    cpu = pool.give(c.query())
    callers = [
        threading.Thread(target=lambda: results.extend(c.linear(x, packed, cpu) for _ in range(8))) for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    pool.close()
    wanted = c.linear(x, packed, c.query())
    assert len(results) == 24 and all(same_bits(y, wanted) for y in results)


@pytest.mark.parametrize("int8", [False, True])
def test_experts(int8):
    weight, x, offsets, rows = expert_case()
    packed, bias = pack_weight(weight), torch.randn(5 * rows).half()
    product = torch.ops.mpq.grouped_linear_int8 if int8 else torch.ops.mpq.grouped_linear
    wanted = product(x, *operands(packed), bias, offsets, *shape(packed))
    assert same_bits(c.grouped_linear(x, packed, offsets, c.query(int8=int8), bias), wanted)


def test_unaligned_memory_and_rows_apart():
    """Weights of mapped files begin anywhere; x may be a part of a wider matrix."""
    packed = pack_weight(mixed_weight())
    x = torch.randn(4, 400)[:, 7:327]
    wanted = torch.ops.mpq.linear(x, *operands(packed), None, *shape(packed))
    args, y = c.linear_args(x, packed, packed.layout.out_features)
    held = []
    for name in ("qweight", "scales", "zeros"):
        tensor = getattr(packed, name)
        memory = torch.zeros(tensor.nbytes + 1, dtype=torch.uint8)
        memory[1:] = tensor.view(torch.uint8)
        held.append(memory)
        setattr(args.weight, name, memory.data_ptr() + 1)
    size, cpu = c_size_t(), c.query()
    c.check(c.LIBRARY.mpq_cpu_workspace_size(byref(args), byref(cpu), byref(size)))
    held.append(c.give_workspace(args, size.value))
    c.check(c.LIBRARY.mpq_cpu_linear(byref(args), byref(cpu)))
    assert same_bits(y, wanted)


def test_no_tokens():
    packed = pack_weight(mixed_weight())
    assert c.linear(torch.empty(0, 320), packed, c.query()).shape == (0, 200)
    weight, x, _, _ = expert_case()
    assert len(c.grouped_linear(x[:0], pack_weight(weight), torch.zeros(6, dtype=torch.int32), c.query())) == 0


def test_versions():
    assert c.LIBRARY.mpq_cpu_version() == c.VERSION
    assert c.LIBRARY.mpq_cpu_layout_id().decode() == LAYOUT_ID
    with pytest.raises(c.CError, match="another version"):
        c.query(version=c.VERSION + 1)


def test_instruction_sets_have_the_names_of_the_operators(int8_isa):
    assert c.LIBRARY.mpq_cpu_isa_name(c.query(int8_isa).isa).decode() == int8_isa
    assert c.LIBRARY.mpq_cpu_isa_name(99) is None
    with pytest.raises(c.CError, match="instruction set"):
        c.query("sse2")


def change(path, value):
    """A function that sets one field of the arguments of a product."""

    def apply(args):
        *parents, last = path.split(".")
        for name in parents:
            args = getattr(args, name)
        setattr(args, last, value)

    return apply


def change_segment(**fields):
    def apply(args):
        for name, value in fields.items():
            setattr(args.weight.segments[1], name, value)

    return apply


REFUSALS = {
    "no qweight": (change("weight.qweight", None), 1),
    "no scales": (change("weight.scales", None), 1),
    "no zeros": (change("weight.zeros", None), 1),
    "no segments": (change("weight.num_segments", 0), 2),
    "no x": (change("x", None), 1),
    "no y": (change("y", None), 1),
    "no workspace": (change("workspace", None), 1),
    "fewer tokens than none": (change("tokens", -1), 2),
    "no rows": (change("weight.out_features", 0), 2),
    "too many rows": (change("weight.out_features", 2**31), 10),
    "too many tokens": (change("tokens", 2**31), 10),
    "a dtype of x": (change("x_dtype", 3), 3),
    "a dtype of scales": (change("weight.scale_dtype", -1), 3),
    "9 bits": (change_segment(bits=9), 4),
    "a group": (change_segment(group_size=33), 4),
    "a kind of zeros": (change_segment(zero=77), 4),
    "columns of nobody": (change_segment(k1=10**12), 4),
    "a gap": (change_segment(k0=192), 5),
    "y with gaps": (change("y_row_stride", 201), 7),
    "x backwards": (change("x_row_stride", -320), 7),
    "a workspace that is too small": (change("workspace_bytes", 8), 8),
    "a gate": (change("x_gate", 4096), 16),
}


@pytest.mark.parametrize("what", REFUSALS)
@pytest.mark.parametrize("int8", [False, True])
def test_refused_with_y_untouched(what, int8):
    packed, x, cpu = pack_weight(mixed_weight()), torch.randn(2, 320), c.query(int8=int8)
    args, y = c.linear_args(x, packed, 200)
    size = c_size_t()
    c.check(c.LIBRARY.mpq_cpu_workspace_size(byref(args), byref(cpu), byref(size)))
    memory = c.give_workspace(args, size.value)
    apply, status = REFUSALS[what]
    apply(args)
    assert c.LIBRARY.mpq_cpu_linear(byref(args), byref(cpu)) == status
    assert y.isnan().all() and memory.eq(255).all()
    assert c.LIBRARY.mpq_cpu_error_text(status) not in (b"", b"ok", b"unknown status")


def test_wrong_values_are_refused():
    packed = pack_weight(mixed_weight(permuted=True))
    packed.perm[3] = 320
    x, cpu = torch.randn(2, 320), c.query()
    for call in (
        lambda: c.linear(x, packed, cpu),
        lambda: c.dequantize(packed, torch.float32, cpu),
        lambda: c.embedding(torch.tensor([0]), packed, torch.float32, cpu),
    ):
        with pytest.raises(c.CError, match="perm"):
            call()
    for id in (-1, 200):
        with pytest.raises(c.CError, match="an id is outside"):
            c.embedding(torch.tensor([0, id]), pack_weight(mixed_weight()), torch.float32, cpu)
    cpu.activations = 2
    with pytest.raises(c.CError) as refused:
        c.linear(x, pack_weight(mixed_weight()), cpu)
    assert refused.value.status == 16


@pytest.mark.parametrize(
    "offsets", [(0, 3, 20, 19, 70, 94), (1, 3, 20, 20, 70, 94), (0, 3, 20, 20, 70, 93), (0, 94), (0, *[9] * 7, 94)]
)
def test_offsets_are_refused(offsets):
    """Decreasing, not from 0, not to the last token, experts that cut a band, rows that are not shared out."""
    weight, x, _, _ = expert_case()
    with pytest.raises(c.CError, match="experts"):
        if len(offsets) == 2:  # ten experts cut the bands of five
            offsets = (0, *itertools.repeat(94, 10))
        c.grouped_linear(x, pack_weight(weight), torch.tensor(offsets, dtype=torch.int32), c.query())
