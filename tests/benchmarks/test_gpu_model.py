"""benchmarks/gpu/model: results and cycles of small kernels by hand, and modelled times of our own kernels as budgets.

The small kernels are machine_code/tiny.cu, read from the text that nvdisasm gave for them. Our own need _cuda.so.
"""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu.model.__main__ import main
from benchmarks.gpu.model.cubins import Code, code_of
from benchmarks.gpu.model.emulator import Launch
from benchmarks.gpu.model.expressions import UnknownInstruction
from benchmarks.gpu.model.figures import LIBRARY, figure
from benchmarks.gpu.model.machines import GRAPH_NODE_US, MACHINES, PIPES
from benchmarks.gpu.model.phases import ONE_LOOP
from benchmarks.gpu.model.pipeline import simulate
from benchmarks.gpu.model.problem import Problem, ProblemError, prepare
from benchmarks.gpu.sass_files import find_tool, run, sections
from benchmarks.layers.shapes import add_shape

H200 = MACHINES["h200"]
TEXT = (Path(__file__).parent / "machine_code" / "tiny_sm90.sass").read_text()
OUT = 5 << 32


def tiny(kernel: str, change=lambda text: text) -> Code:
    """One of the small kernels."""
    return code_of(change(TEXT), kernel, {})


def launched(code: Code, form: str, *values, warps=1):
    """Traces of a block of so many warps, and what it wrote to global memory."""
    memory: dict[int, int] = {}

    def add(address, value):
        before = memory.get(address, 0)
        memory[address] = before + value
        return before

    params = struct.pack(f"@{form}", *values)
    launch = Launch(params, H200.params_at, warps=warps, atomic=add, store=memory.__setitem__)
    return code.emulator.run(launch), memory


def opcodes(code: Code, trace, name: str) -> int:
    """How often a warp issued an opcode."""
    return sum(code.program.instructions[n].opcode.startswith(name) for n, _, _ in trace)


# ---- the emulator ----


def test_loop_and_division():
    code = tiny("sums_kernel")
    traces, memory = launched(code, "QII", OUT, 10, 7, warps=3)
    # Sums of squares below 10, 11, 12: 285, 385, 506.
    assert memory == {OUT: 285 // 7, OUT + 4: 385 // 7, OUT + 8: 506 // 7}
    # The loop's comparison is the second of ISETP.GE.U32: once an iteration; the division has two more.
    assert [opcodes(code, t, "ISETP.GE.U32") for t in traces] == [10 + 2, 11 + 2, 12 + 2]


@pytest.mark.parametrize("sum_of,divisor", [(1000, 1), (1000, 3), (2953, 2**31 + 11), (77, 332833)])
def test_division_is_exact(sum_of, divisor):
    total = sum(i * i for i in range(sum_of)) % 2**32
    _, memory = launched(tiny("sums_kernel"), "QII", OUT, sum_of, divisor)
    assert memory == {OUT: total // divisor}


def test_shared_memory_passes_from_warp_to_warp():
    code = tiny("pass_kernel")
    traces, memory = launched(code, "QI", OUT, 2, warps=4)
    x = 1
    for i in range(6):
        x = 3 * x + i
    assert memory == {OUT + 4 * w: x for w in range(4)}
    assert {opcodes(code, t, "ISETP.GE.U32") for t in traces} == {6}
    # Warp 0 alone computed the number: the others skipped the product.
    products = [n for n, i in enumerate(code.program.instructions) if i.predicate == "!P0" and i.opcode == "IMAD"]
    assert [[taken for n, taken, _ in t if n in products] for t in traces] == [[True], [False], [False], [False]]


def test_floats():
    _, memory = launched(tiny("chain_kernel"), "Qf", OUT, 0.5)
    # x -> x / 2 + 1 sixteen times from 1/2: 2 - 1.5 / 2^16, exact in fp32.
    assert memory == {OUT: struct.unpack("<I", struct.pack("<f", 2 - 1.5 / 2**16))[0]}


def test_unknown_instruction_is_named():
    code = tiny("chain_kernel", lambda text: text.replace("S2R R5, SR_TID.X", "TTUOPEN R5"))
    with pytest.raises(UnknownInstruction, match="TTUOPEN R5"):
        launched(code, "Qf", OUT, 0.5)


# ---- the pipeline: cycles by hand, from the stalls and scoreboards of the encodings ----


def cycles(code: Code, traces, **changes) -> int:
    return simulate(code.program, traces, replace(H200, **changes)).cycles


def test_chain():
    """The first instruction is fetched until 30; LDC R7 issues at 38 and is there at 78; S2R behind it in the pipe at
    40; LDC.64 at 47, there at 87. FFMA at 78, 82, 86; IMAD.WIDE, which wants LDC.64, at 87 with a stall of 4; FFMA at
    91, 95 ... 139 with a stall of 5; STG at 144, EXIT at 145."""
    code = tiny("chain_kernel")
    traces, _ = launched(code, "Qf", OUT, 0.5)
    assert cycles(code, traces) == 145
    assert cycles(code, traces, code_l0_miss=50) == 145 + 20
    # Both loads of constants 10 cycles later: FFMA at 88, 92, 96, IMAD.WIDE at 97.
    assert cycles(code, traces, latency={**H200.latency, "constant": 50}) == 145 + 10


def test_barrier():
    """Warp 0: STS at 123, BAR at 124; the other was there at 88. Both go on at 144, LDS takes 30, the second one waits
    a cycle for shared memory. Six iterations of 25 cycles from 203 (204) on, then 76 cycles to EXIT."""
    code = tiny("pass_kernel")
    traces, _ = launched(code, "QI", OUT, 2, warps=2)
    found = simulate(code.program, traces, H200)
    assert found.finished == [203 + 6 * 25 + 76, 204 + 6 * 25 + 76]
    assert found.cycles == 430
    assert found.waited[""]["other warps"] == (144 - 124 - 6) + (144 - 88 - 6)  # BAR itself stalls 6


def test_warps_of_one_scheduler_share_its_pipes():
    code = tiny("chain_kernel")
    alone, _ = launched(code, "Qf", OUT, 0.5)
    many, _ = launched(code, "Qf", OUT, 0.5, warps=16)  # four on each scheduler
    slow = {**PIPES, "fma": 8}
    assert cycles(code, many) < cycles(code, alone) + 60
    # 16 FFMA of each of four warps: at 8 cycles each the pipe is the bound.
    assert cycles(code, many, pipes=slow) >= 16 * 4 * 8
    found = simulate(code.program, many, replace(H200, pipes=slow))
    assert found.waited[""].most_common(1)[0][0] == "fma pipe"
    assert found.busy["fma"] == 16 * 16 * 8


def test_code_comes_late():
    code = tiny("sums_kernel")
    traces, _ = launched(code, "QII", OUT, 10, 7)
    lines = {i.address // 128 for n, i in enumerate(code.program.instructions) if any(n == e[0] for e in traces[0])}
    warm, cold = (simulate(code.program, traces, H200, cold=c) for c in (False, True))
    assert warm.code_misses == 1  # the first line; each of the others is the next one
    assert cold.code_misses == len(lines)
    # One after the other, and the last LDC, waited for 17 cycles when warm, is there before the next line.
    assert warm.waited[""]["constants"] == 17 and cold.waited[""]["constants"] == 0
    assert cold.cycles == warm.cycles + H200.code_l1_miss * len(lines) - H200.code_l0_miss - 17


# ---- our own kernels ----


@pytest.fixture(scope="module")
def built():
    """Skips where there is no machine code to read."""
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} was not built (no nvcc, or MPQ_CUDA_ARCHS=none)")
    for tool in ("cuobjdump", "nvdisasm"):
        if not find_tool(tool):
            pytest.skip(
                f"{tool} is neither in the triton package, nor in CUDA_HOME, nor on the PATH: pip install triton"
            )


def made(shape: str, bits: str, tokens: int, **more) -> Problem:
    assert add_shape(shape)
    return Problem(shape, bits, tokens, **more)


# Shape, widths, M -> instructions for each weight of the middle block, cycles of the middle block and of the same block
# where it adds what others left: what the model says of the kernels as they are, nvcc 13.0, and 2%.
BUDGETS = {
    ("8192x8192", "8", 1): (2.09, 34_850, 34_850),
    ("8192x8192", "4", 1): (1.42, 19_050, 19_050),
    ("8192x8192", "3", 1): (1.62, 15_310, 15_310),
    ("8192x8192", "2", 1): (1.29, 11_610, 11_610),
    ("8192x8192", "4", 16): (2.08, 21_410, 23_460),
    ("4096x4096", "4", 1): (2.24, 7_760, 8_390),
    ("4096x4096", "4", 8): (2.51, 8_060, 9_190),
    ("4096x4096", "4", 16): (3.32, 9_210, 11_880),
    ("4096x4096", "2", 16): (3.20, 8_570, 11_250),
    ("4096x4096", "4", 32): (4.78, 13_450, 19_910),
    ("4096x4096", "4", 64): (7.40, 19_170, 29_270),
    ("8192x8192", "4", 32): (4.02, 36_930, 41_320),
    ("8192x8192", "4", 64): (6.54, 61_740, 68_880),
    ("8192x8192", "8", 32): (6.93, 56_470, 60_860),
    ("llama-8b-qkv", "4|3|8", 1): (1.77, 11_060, 11_700),
}


def over(problem: Problem, budget: tuple[float, int, int]) -> list[str]:
    """What exceeds its budget."""
    f = figure(problem, H200)
    found = (round(f.instructions_per_weight, 3), f.middle.cycles, f.last.cycles)
    names = ("instructions for each weight", "cycles of a middle block", "cycles of the last block")
    return [f"{n} {name}, budget {most}" for n, name, most in zip(found, names, budget, strict=True) if n > most]


@pytest.mark.parametrize("point", BUDGETS, ids=lambda p: "-".join(map(str, p)))
def test_budgets(built, point):
    assert over(made(*point), BUDGETS[point]) == []


def test_budgets_can_fail(built):
    wrong = over(made("4096x4096", "4", 1), tuple(0.9 * n for n in BUDGETS["4096x4096", "4", 1]))
    assert [w.split(", ")[0].split(" ", 1)[1] for w in wrong] == [
        "instructions for each weight", "cycles of a middle block", "cycles of the last block",
    ]  # fmt: skip


def test_phases_and_what_bounds_them(built):
    f = figure(made("4096x4096", "4", 1), H200)
    assert set(f.middle.waited) == {"prologue", "product", "flush", "reduction"}
    # Nothing is lost: each warp's time is in its phases.
    for block in (f.middle, f.last):
        assert sum(sum(w.values()) for w in block.waited.values()) == sum(block.finished)
        assert sum(block.issued.values()) == block.instructions
    # The last block does more, in its reduction alone.
    more = {phase for phase in f.last.issued if f.last.issued[phase] != f.middle.issued[phase]}
    assert more == {"reduction"} and f.last.cycles > f.middle.cycles
    slow = figure(made("4096x4096", "4", 1), replace(H200, bandwidth=0.5e12, l2_bandwidth=0.5e12))
    assert slow.cycles > 1.5 * f.cycles and slow.floor_us == pytest.approx(8.6 * f.floor_us)
    assert max(slow.middle.waited["product"], key=slow.middle.waited["product"].__getitem__) == "weights"


def test_a_product_of_many_tokens_has_a_kernel_before_it(built):
    few, many = (figure(made("2048x2048", "4", m), H200) for m in (16, 17))
    assert few.arrange is None and few.plan.arrange_kernel is None
    assert many.plan.kernel == "wide_kernel<false, 2>" and many.plan.arrange_kernel == "arrange_kernel<false>"
    assert many.cycles == many.last.cycles + many.arrange.cycles > many.last.cycles
    assert few.us - few.body_us == pytest.approx(GRAPH_NODE_US)
    assert many.us - many.body_us == pytest.approx(2 * GRAPH_NODE_US)


@pytest.mark.parametrize("machine", [name for name in MACHINES if name != "h200"])
def test_other_machines(built, machine):
    f = figure(made("2048x2048", "4", 1), MACHINES[machine])
    assert f.plan.grid[0] <= MACHINES[machine].multiprocessors and 0 < f.fraction_of_floor < 1


def test_problems_that_cannot_be_prepared():
    with pytest.raises(ProblemError, match="not as many members"):
        prepare(made("512x512", "4|3|8", 1), H200)
    with pytest.raises(ProblemError, match="512x512, 4 bits, 1 tokens: device: mpq_status 9"):
        prepare(made("512x512", "4", 1), replace(H200, shared_bytes=1024))
    with pytest.raises(ProblemError, match="on tensor cores, are modelled"):
        prepare(made("512x512", "4", 1, group_size=8), H200)


def test_command(built, capsys):
    words = ["--shape", "2048x2048", "--tokens"]
    main([*words, "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    f = figure(made("2048x2048", "4", 1), H200)
    assert (found["cycles"], found["us"], found["modelled"]) == (f.cycles, round(f.us, 2), True)
    assert found["fraction_of_floor"] == round(f.fraction_of_floor, 3)
    main([*words, "1,2"])
    out = capsys.readouterr().out
    assert f" {f.body_us:.1f} " in out and "Modelled from machine code, not measured" in out and "prologue" not in out
    main([*words, "1"])
    out = capsys.readouterr().out
    assert all(f"\n  {phase} " in out for phase in ONE_LOOP)
    with pytest.raises(SystemExit, match="2048x2048 has not as many members as 4|3 has widths"):
        main([*words, "1", "--segments", "4|3"])


def test_command_on_a_cubin(built, capsys, tmp_path):
    """The same kernel and block as a peer's: what its cubin gives is what the library gives."""
    run(find_tool("cuobjdump"), "-xelf", "sm_90.", str(LIBRARY), cwd=tmp_path)
    plan = prepare(made("2048x2048", "4", 1), H200)
    values = ",".join(map(str, struct.unpack(f"{len(plan.params) // 8}Q", plan.params)))
    for cubin in sorted(tmp_path.glob("*.cubin")):
        if any("decode_kernelILb0ELi1ELi4ELi4E" in name for name in sections(cubin.read_bytes())):
            break
    f = figure(made("2048x2048", "4", 1), H200)
    words = ["--cubin", str(cubin), "--kernel", "decode_kernelILb0ELi1ELi4ELi4E", "--grid", str(plan.grid[0]), "--json"]
    words += ["--threads", str(32 * plan.warps), "--block", str(f.block), "--bytes", str(f.floor_us * 4.3e6)]
    words += ["--scale-lanes", "12"]  # scales and zeros are copied together
    main([*words, "--params", f"{len(plan.params) // 8}Q:{values}"])
    found = json.loads(capsys.readouterr().out)
    assert found["cycles"] == f.middle.cycles
