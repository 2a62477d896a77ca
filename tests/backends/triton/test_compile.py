"""The Triton kernels compile for devices that are not there, without spills; on sm_90 weights stay in registers."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")  # says nothing new: every launch passes its own choice
if find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install triton)", allow_module_level=True)

from mpq_kernels.backends.triton import configs
from mpq_kernels.backends.triton.configs import natural_columns
from mpq_kernels.backends.triton.dense import slow_kernel
from mpq_kernels.backends.triton.linear import linear_kernel
from tests.backends.triton import compiled
from tests.backends.triton.compiled import CASES, TARGETS, compile_case, count

# On every other architecture than sm_90, where everything is compiled.
OTHERS = ("linear 4 bits, int zeros, bf16, 16", "linear 7 bits, int zeros, bf16, 32", "any", "dequantize 8", "reduce")
SELECTED = [(arch, case) for arch in TARGETS for case in CASES if arch == "sm_90" or case.label.startswith(OTHERS)]


def counts_of(arch, index):
    """Counts of CASES[index]: what a process of the pool does."""
    return count(compile_case(CASES[index], arch), arch)


@pytest.fixture(scope="module")
def counts(request):
    """(arch, case) -> a future Counts, of the tests that were asked for: two compilers at a time."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        items = [item for item in request.session.items if item.module is request.module]
        asked = [item.callspec.params for item in items if "counts" in item.fixturenames]
        yield {(p["arch"], p["case"]): pool.submit(counts_of, p["arch"], CASES.index(p["case"])) for p in asked}


@pytest.mark.parametrize(("arch", "case"), SELECTED, ids=[f"{arch} {case.label}" for arch, case in SELECTED])
def test_compiles_without_spills(counts, arch, case):
    counts = counts[arch, case].result()
    assert counts.spills == 0 and 0 < counts.registers <= 255, counts
    if case.kernel is not linear_kernel:
        assert case.kernel is slow_kernel or counts.operand_moves == 0, counts
        return
    if arch == "sm_90":
        # 16 chunks of k16 x m64 for 64 columns of 256 rows, by each width. Stores in the loop: one for the scales of
        # 256 rows in 128 threads; float zeros add theirs and the sums of x. Operand A of one step would take 16.
        assert counts.wgmma == len(case.kinds) * case.step // 4, counts
    if not arch.startswith("gfx"):
        # Words of a step in so many buffers, the one that is multiplied among them: `stages` less the one to come.
        step_bytes = max(bits for bits, _ in case.kinds) * 64 * 4 * case.step // 8
        stages = configs.stages(configs.TABLE["cuda"][0].num_stages, max(bits for bits, _ in case.kinds), case.step)
        assert counts.shared >= (stages - 1) * step_bytes > step_bytes, counts
    if not arch.startswith("gfx") and arch != "sm_100":
        assert counts.operand_moves == 0, counts
        # x in another order than in memory is stored two bytes at a time: 64 columns of block_m tokens by 128 threads.
        natural = natural_columns(f"cuda:{TARGETS[arch].arch}", compiled.VERSION)
        of_x = 0 if natural else case.block_m // 2
        assert counts.stores_in_loop <= of_x + (8 if case.kinds[0][1] == "float" else 2), counts


def test_the_counters_see_a_round_trip():
    """The count of stores is no constant: sm_100's tensor cores take operand A from outside the registers."""
    case = next(case for case in CASES if case.kernel is linear_kernel and case.kinds == ((4, "int"),))
    assert count(compile_case(case, "sm_100"), "sm_100").stores_in_loop >= 16
    assert compiled.operand_moves("%a = ttg.local_load %x : t -> tensor<ttg.dot_op<{opIdx = 0, parent = #mma}>>") == 1
    amd = [".LBB0_1:", "\tds_write_b16 v1, v2", "\tv_mfma_f32_16x16x16_bf16 v[0:3]", "\ts_cbranch_scc0 .LBB0_1"]
    loop = compiled.smallest_loop("\n".join([*amd, "\tds_write_b32 v0, v1"]))
    assert len(loop) == 3 and compiled.stores_of(loop) == 1
