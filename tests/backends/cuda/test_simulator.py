"""The host simulator of the CUDA device interface: primitives give the right values, and every kind of bug is found.

The kernels are tests/cpp/sim_kernels.cpp (right) and sim_bugs.cpp (one bug each). Values are chosen so that results
are exact in any order of summation, and compared for equality.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.backends.cuda import simulator as sim

BUGS = sim.ROOT / "tests/cpp/sim_bugs.cpp"
KERNELS = [sim.ROOT / "tests/cpp/sim_kernels.cpp", BUGS]
ORDERS = {
    "forward": (sim.FORWARD, 0),
    "reverse": (sim.REVERSE, 0),
    "random1": (sim.RANDOM, 1),
    "random2": (sim.RANDOM, 2),
}


class Params(ctypes.Structure):
    """Params of sim_kernels.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("in0", "in1", "out", "workspace")]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return sim.build(tmp_path_factory.mktemp("simulator"), KERNELS)


@pytest.fixture
def machine(library):
    """The reset simulator with four arrays; launch(name, ...) returns (code, error text)."""
    library.mpq_sim_reset()
    arrays = SimpleNamespace(
        in0=np.zeros(65536, np.float32),
        in1=np.zeros(4096, np.float32),
        out=np.full(3 * 65536, np.nan, np.float32),
        counter=None,
        workspace=np.full(8192, np.nan, np.float32),
    )
    arrays.workspace[:4].view(np.uint32)[:] = 0

    def launch(name, grid=(1, 1), threads=32, shared=4096, overlap=0, in0_bytes=None, in1_flags=0):
        if not getattr(launch, "allowed", False):
            sim.allow(library, arrays.in0[: (in0_bytes or arrays.in0.nbytes) // 4], 0, "in0")
            sim.allow(library, arrays.in1, in1_flags, "in1")
            sim.allow(library, arrays.out, sim.WRITABLE, "out")
            sim.allow(library, arrays.workspace[:4], sim.WRITABLE, "counter")
            sim.allow(library, arrays.workspace[4:], sim.WRITABLE | sim.UNDEFINED, "workspace")
            launch.allowed = True
        params = Params(*(a.ctypes.data for a in (arrays.in0, arrays.in1, arrays.out, arrays.workspace)))
        code = library.sim_launch(name.encode(), *grid, threads, shared, overlap, ctypes.byref(params))
        return code, library.mpq_sim_error().decode()

    yield SimpleNamespace(library=library, launch=launch, **vars(arrays))
    library.mpq_sim_reset()


@pytest.fixture(params=ORDERS)
def any_order(request, machine):
    """The machine in every order of blocks, warps and lanes."""
    machine.library.mpq_sim_order(*ORDERS[request.param])
    return machine


def bits16(values: torch.Tensor) -> np.ndarray:
    """The bytes of a 16-bit tensor as float32 words, to lay into an input."""
    return values.contiguous().view(torch.int16).numpy().reshape(-1).view(np.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 2.0**-24], ids=["normal", "subnormal"])
def test_mma(any_order, dtype, scale):
    a = torch.randint(-100, 100, (16, 16)).to(dtype) * scale  # at 2**-24: fp16 subnormals
    b, c = torch.randint(-100, 100, (16, 8)).to(dtype), torch.randint(-100, 100, (16, 8)).float() * scale
    any_order.in0[:128], any_order.in1[:64] = bits16(a), bits16(b)
    any_order.out[:128] = c.numpy().reshape(-1)
    assert any_order.launch("mma_f16" if dtype == torch.float16 else "mma_bf16") == (0, "")
    expected = c.double() + a.double() @ b.double()
    assert torch.equal(torch.from_numpy(any_order.out[:128]).double().reshape(16, 8), expected)
    assert sim.counts(any_order.library)["mmas"] == 1


def test_mma_rounds_once(machine):
    """1 + 15 * 2**-24 lies above half a unit in the last place of 1: adding one product at a time would stay at 1."""
    a, b = torch.zeros(16, 16, dtype=torch.float16), torch.ones(16, 8, dtype=torch.float16)
    a[:, 0], a[:, 1:] = 1, 2.0**-24
    machine.in0[:128], machine.in1[:64], machine.out[:128] = bits16(a), bits16(b), 0
    assert machine.launch("mma_f16") == (0, "")
    assert np.array_equal(machine.out[:128], np.full(128, np.float32(1 + 15 * 2.0**-24)))


def test_ldmatrix(any_order):
    values = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    any_order.in0[:128] = bits16(values)
    assert any_order.launch("ldmatrix") == (0, "")
    got = torch.from_numpy(any_order.out[:128].view(np.int16)).reshape(8, 4, 4, 2)  # row, pair of columns, matrix, half
    assert torch.equal(got, values.reshape(4, 8, 4, 2).permute(1, 2, 0, 3))


def test_shuffle(any_order):
    x = any_order.in0[:256] = np.arange(256, dtype=np.float32)
    assert any_order.launch("shuffle", threads=256) == (0, "")
    assert np.array_equal(any_order.out[:256], x[np.arange(256) ^ 5] + np.repeat(x.reshape(8, 32).sum(1), 32))


@pytest.mark.parametrize("interleave", [0, 1])
@pytest.mark.parametrize("kernel", ["ring", "bulk_ring"])
def test_copies(any_order, kernel, interleave):
    any_order.library.mpq_sim_interleave(interleave)
    x = any_order.in0[:2048] = np.random.default_rng(0).integers(0, 1000, 2048).astype(np.float32)
    assert any_order.launch(kernel, grid=(7, 1), threads=256) == (0, "")
    readers = 256 if kernel == "ring" else 224
    expected = x.reshape(8, 256).sum(0)[::-1][:readers]
    assert np.array_equal(any_order.out[: 7 * 256].reshape(7, 256)[:, :readers], np.tile(expected, (7, 1)))
    count = sim.counts(any_order.library)
    assert count["blocks"] == 7 and count["unwaited_copies"] == 0
    assert count["cp_async_bytes" if kernel == "ring" else "bulk_bytes"] == 7 * 8192


@pytest.mark.parametrize("interleave", [0, 1])
def test_last_block_to_arrive_sums(any_order, interleave):
    any_order.library.mpq_sim_interleave(interleave)
    any_order.in0[:128] = np.arange(128)
    for _ in range(2):  # the counter is left as it was found
        any_order.out[:] = np.nan
        assert any_order.launch("last_arriver", grid=(5, 3), threads=128, overlap=1) == (0, "")
        assert np.array_equal(any_order.out[:128], 120 * np.arange(128, dtype=np.float32))


def test_numbers(machine):
    rng = np.random.default_rng(0)
    x = machine.in0
    x[:] = rng.integers(0, 2**32, x.size, dtype=np.uint32).view(np.float32)
    x[:32768] = np.ldexp(rng.integers(-(2**13), 2**13, 32768).astype(np.float32), rng.integers(-38, 6, 32768))  # ties
    x[:8] = [0, -0.0, np.inf, -np.inf, 65519.99, 65520, -65520, 2.0**-25]
    assert machine.launch("numbers", grid=(256, 1), threads=256) == (0, "")
    patterns = torch.from_numpy(machine.out.view(np.int16)[: 2 * 65536]).reshape(2, 65536)
    values = torch.from_numpy(machine.out[65536:]).reshape(2, 65536)
    finite = torch.from_numpy(~np.isnan(x))
    everything = torch.arange(65536).to(torch.int16)
    for i, dtype in enumerate((torch.float16, torch.bfloat16)):
        expected = torch.from_numpy(x).to(dtype).view(torch.int16)
        assert torch.equal(patterns[i][finite], expected[finite])
        assert (patterns[i][~finite] == 0x7FFF).all()
        assert torch.equal(values[i].isnan(), everything.view(dtype).isnan())
        assert torch.equal(values[i].nan_to_num(), everything.view(dtype).float().nan_to_num())


# Kernel of sim_bugs.cpp -> what the error says (in forward order). Lanes and threads are those of the first to fail.
SIXTY_FOUR = {"threads": 64}
TWO_BLOCKS = {"threads": 64, "grid": (2, 1)}
FOUND = {
    "shared_past_end": (
        {"shared": 1024},
        "st_shared of 4 bytes at shared byte 1024: outside the 1024 bytes of the launch",
    ),
    "shared_address_zero": ({}, "st_shared of 4 bytes at shared byte -1024: outside"),
    "shared_misaligned": ({}, "st_shared of 16 bytes at shared byte 4: not aligned to 16"),
    "shared_undefined": ({}, "ld_shared at shared byte 0: undefined"),
    "missing_warp_sync": ({}, "ld_shared at shared byte 4: undefined"),
    "ldmatrix_without_sync": ({}, "written by thread 1 (warp 0, lane 1) without a warp_sync in between"),
    "overwritten_in_warp": (
        {},
        "st_shared at shared byte 0: read by thread 1 (warp 0, lane 1) without a warp_sync in between",
    ),
    "missing_block_sync": (SIXTY_FOUR, "ld_shared at shared byte 128: undefined"),
    "overwritten_while_read": (SIXTY_FOUR, "without a block_sync in between"),
    "two_writers": ({}, "st_shared at shared byte 0: written by thread 0 (warp 0, lane 0) without a warp_sync"),
    "missing_wait": ({}, "ld_shared at shared byte 0: a copy by thread 0 (warp 0, lane 0) is under way"),
    "missing_commit": ({}, "is under way, its wait is missing"),
    "wait_for_too_few": ({}, "is under way, its wait is missing"),
    "wait_without_block_sync": (SIXTY_FOUR, "written by thread 0 (warp 0, lane 0) without a block_sync in between"),
    "copy_over_readers": (
        SIXTY_FOUR,
        "cp_async at shared byte 128: read by thread 0 (warp 0, lane 0) without a block_sync",
    ),
    "store_over_copy": ({}, "st_shared at shared byte 0: a copy by thread 0 (warp 0, lane 0) is under way"),
    "diverged": ({}, "lanes of a warp diverge: this one is at warp_sync, lanes 0x00000001 at shfl_xor"),
    "diverged_block_sync": ({}, "diverge: this one is at block_sync, lanes 0x00000001 at warp_sync"),
    "lane_exits": ({}, "thread 7 (warp 0, lane 7) exits while lanes 0x0000007f of its warp wait at shfl_xor"),
    "half_a_warp": (
        {"threads": 16},
        "warp_sync needs all lanes of the warp: lanes 0xffff0000 have exited or do not exist",
    ),
    "shuffle_masks": ({}, "shfl_xor with mask 1 in lane 1 and 0 in lane 0"),
    "half_block_sync": (SIXTY_FOUR, "thread 32 (warp 1, lane 0) exits while 32 of 64 threads wait at block_sync"),
    "barrier_never_ends": ({}, "no thread can continue: thread 0 (warp 0, lane 0) waits at mbarrier_wait"),
    "barrier_not_initialised": ({}, "mbarrier_wait at shared byte 0: no mbarrier was initialised there"),
    "barrier_too_many": ({}, "mbarrier_expect at shared byte 0: more than the 1 arrivals of a phase"),
    "bulk_without_wait": (SIXTY_FOUR, "ld_shared at shared byte 0: a copy by thread 0 (warp 0, lane 0) is under way"),
    "bulk_waited_by_one": (SIXTY_FOUR, "ld_shared at shared byte 128: written by thread 0 (warp 0, lane 0) without"),
    "bulk_bytes": ({}, "mbarrier at shared byte 1024: 528 bytes copied, 512 expected"),
    "bulk_size": ({}, "bulk_copy of 24 bytes: not a positive multiple of 16"),
    "bulk_over_readers": (
        SIXTY_FOUR,
        "bulk_copy at shared byte 0: read by thread 0 (warp 0, lane 0) without a block_sync",
    ),
    "global_past_end": ({}, "ld_constant of 4 bytes at byte 16384 of 'in0': outside its 16384 bytes"),
    "global_misaligned": ({}, "ld_constant of 16 bytes at byte 4 of 'in0': the address is not a multiple of 16"),
    "copy_past_end": ({}, "cp_async of 16 bytes at byte 16384 of 'in0': outside"),
    "store_to_input": ({}, "st_global at byte 0 of 'in0': read-only"),
    "workspace_undefined": ({}, "ld_from_others at byte 0 of 'workspace': undefined"),
    "input_as_constant": ({"in1_flags": sim.INPUT}, "ld_constant at byte 0 of 'in1': an earlier kernel may have"),
    "input_too_early": ({"in1_flags": sim.INPUT}, "ld_constant at byte 0 of 'in1' before wait_for_earlier_kernels"),
    "store_too_early": ({"overlap": 1}, "st_global at byte 0 of 'out' before wait_for_earlier_kernels"),
    "store_race": (TWO_BLOCKS, "st_global at byte 0 of 'out': written in this launch by block (0, 0), thread 0"),
    "store_race_in_block": ({}, "st_global at byte 0 of 'out': written in this launch by block (0, 0), thread 0"),
    "constant_written": ({}, "ld_constant at byte 0 of 'out': written in this launch"),
    "stale_read": (TWO_BLOCKS, "ld_global at byte 0 of 'out': written in this launch by block (0, 0), thread 0"),
    "arrive_without_fence": (TWO_BLOCKS, "without a thread_fence and an atomic_add in between"),
    "arrive_without_sync": (TWO_BLOCKS, "without a thread_fence and an atomic_add in between"),
    "read_without_arriving": (TWO_BLOCKS, "without a thread_fence and an atomic_add in between"),
}
# The same kernels find other things in reverse order.
FOUND_IN_REVERSE = {
    "missing_warp_sync": ({}, "ld_shared at shared byte 120: undefined"),
    "wait_without_block_sync": (SIXTY_FOUR, "ld_shared at shared byte 496: undefined"),
    "barrier_without_sync": (SIXTY_FOUR, "mbarrier_arrive at shared byte 0: initialised by thread 32 (warp 1, lane 0)"),
    "lane_exits": ({}, "exits while lanes 0xffffff00 of its warp wait at shfl_xor"),
    "store_race": (TWO_BLOCKS, "st_global at byte 252 of 'out': written in this launch by block (1, 0), thread 63"),
}
CASES = [("forward", name, *case) for name, case in FOUND.items()]
CASES += [("reverse", name, *case) for name, case in FOUND_IN_REVERSE.items()]


@pytest.mark.parametrize(("order", "name", "how", "text"), CASES, ids=[f"{c[1]}-{c[0]}" for c in CASES])
def test_bug_is_found(machine, order, name, how, text):
    machine.library.mpq_sim_order(*ORDERS[order])
    code, error = machine.launch(name, in0_bytes=16384, **how)
    assert code == sim.CHECK_FAILED
    assert text in error
    assert " [block (" in error and "), thread " in error


# Nothing to find, or found only in one order.
EXEMPT = {"unwaited_copy": "counted, no error", "barrier_without_sync": "in forward order not initialised at all"}


@pytest.mark.parametrize("name", sorted(FOUND))
@pytest.mark.parametrize("seed", [3, 4])
def test_bug_is_found_in_random_order(machine, name, seed):
    machine.library.mpq_sim_order(sim.RANDOM, seed)
    machine.library.mpq_sim_interleave(1)
    assert machine.launch(name, in0_bytes=16384, **FOUND[name][0])[0] == sim.CHECK_FAILED


def test_every_bug_has_a_case():
    kernels = {line.split("(")[1].split(")")[0] for line in BUGS.read_text().splitlines() if line.startswith("BUG(")}
    assert kernels == {*FOUND, *FOUND_IN_REVERSE, *EXEMPT}


def test_unwaited_copies_are_counted(machine):
    assert machine.launch("unwaited_copy") == (0, "")
    assert sim.counts(machine.library)["unwaited_copies"] == 32


def test_first_error_stays_until_reset(machine):
    code, error = machine.launch("shared_undefined")
    assert (code, machine.launch("shuffle", threads=256)) == (sim.CHECK_FAILED, (sim.CHECK_FAILED, error))
    machine.library.mpq_sim_reset()
    machine.launch.allowed = False
    assert machine.launch("shuffle", threads=256) == (0, "")


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"threads": 2048}, "2048 threads: at least 1 of each, at most 1024 threads"),
        ({"grid": (0, 1)}, "launch of 0 x 1 blocks"),
        ({"shared": 227 * 1024 + 2}, "launch with 232450 bytes of shared memory"),
    ],
)
def test_launch_that_no_machine_takes(machine, how, text):
    code, error = machine.launch("shuffle", **how)
    assert code == sim.CHECK_FAILED and text in error


def test_clocks_restart(machine):
    machine.in0[:1].view(np.uint32)[:] = 2**21
    assert machine.launch("long_run", threads=64) == (0, "")
    assert np.array_equal(machine.out[:64].view(np.uint32), np.arange(64)[::-1])


def test_portable_fibers(tmp_path):
    """The same on swapcontext, in a second library of the same process."""
    library = sim.build(tmp_path, KERNELS, "-DMPQ_SIM_UCONTEXT", "-O0")
    x, y = np.arange(256, dtype=np.float32), np.zeros(256, np.float32)
    sim.allow(library, x, 0, "x")
    sim.allow(library, y, sim.WRITABLE, "y")
    params = ctypes.byref(Params(x.ctypes.data, None, y.ctypes.data, None))
    assert library.sim_launch(b"shuffle", 1, 1, 256, 0, 0, params) == 0, library.mpq_sim_error()
    assert np.array_equal(y, x[np.arange(256) ^ 5] + np.repeat(x.reshape(8, 32).sum(1), 32))
    assert library.sim_launch(b"diverged", 1, 1, 32, 0, 0, params) == sim.CHECK_FAILED
