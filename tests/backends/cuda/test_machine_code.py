"""Budgets for the machine code of the CUDA library, for every kernel and architecture in it. No GPU is needed.

Each check is a function of a kernel that yields what is wrong with it; the second half of this file proves on a small
made-up kernel that it can fail. benchmarks/gpu/sass.py reads what the tools print,
`python benchmarks/gpu/sass_table.py` prints the figures.
"""

import os
import re
from pathlib import Path

import pytest

from benchmarks.gpu import sass, sass_files

ROOT = Path(__file__).resolve().parents[3]
LIBRARY = ROOT / "mpq_kernels" / "_cuda.so"
REGISTER_FILE = 65536
# Registers of a thread by kernel and blocks of 8 tokens: the most of any architecture, nvcc 13.0, rounded up to 8.
REGISTERS = {
    ("linear_kernel", 1): 168,  # the made-up kernel of this file
    ("decode_kernel", 1): 128,  # two blocks of 256 threads on a multiprocessor
    ("decode_kernel", 2): 208,
    ("decode_kernel of any weight", 1): 200,
    ("decode_kernel of any weight", 2): 240,
    ("wide_kernel", 1): 248,
    ("wide_kernel", 2): 248,
    ("grouped_kernel", 1): 184,
    ("grouped_kernel", 2): 200,
    ("grouped_kernel", 4): 255,
    ("generic_kernel", 1): 168,
    ("dequantize_kernel", 1): 176,
    ("embedding_kernel", 1): 64,
    ("table_kernel", 1): 16,
    ("arrange_kernel", 1): 64,
}
# Kernels that multiply.
MULTIPLY = ("linear_kernel", "decode_kernel", "grouped_kernel", "wide_kernel")
COUNTING = ("linear_kernel", "decode_kernel", "wide_kernel")
WIDE_TILES = 4  # blocks of 8 tokens of a warp of wide_kernel
# Instructions for each weight of a supertile, for up to 8 tokens. Those of 2, 3, 4 and 8 bits are goals: at 4.3 TB/s an
# H200 has 0.97 b issue slots for each weight of b bits. The others are what they were, rounded up.
TILE = {1: 0.8, 2: 1.0, 3: 1.5, 4: 1.1, 5: 1.8, 6: 1.8, 7: 2.25, 8: 2.0}
# Instructions of a flush with fp16 scales, and of the bookkeeping of a unit: what they were, and 5%.
FLUSH = {"none": 126, "int": 128}
UNIT = 195


@pytest.fixture(scope="module")
def kernels():
    """All kernels of the library."""
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} was not built (no nvcc, or MPQ_CUDA_ARCHS=none)")
    for tool in ("cuobjdump", "nvdisasm"):
        if not sass_files.find_tool(tool):
            pytest.skip(
                f"{tool} is neither in the triton package, nor in CUDA_HOME, nor on the PATH: pip install triton"
            )
    return sass_files.read_kernels(LIBRARY)


def collect(kernels, check):
    """Everything that a check finds, with the kernel it is about."""
    return [f"sm_{k.arch} {k.name}: {wrong}" for k in kernels for wrong in check(k)]


def check_resources(kernel):
    """Registers within budget and register file, nothing in local memory."""
    r = kernel.resources
    any_weight = kernel.stem == "decode_kernel" and kernel.arguments[3] == "0"
    budget = REGISTERS.get((kernel.stem + (" of any weight" if any_weight else ""), kernel.token_tiles))
    if budget is None:
        yield "has no budget of registers in this file"
    elif r["REG"] > budget:
        yield f"{r['REG']} registers, budget {budget}"
    if r["REG"] * kernel.max_threads > REGISTER_FILE:
        yield f"{r['REG']} registers x {kernel.max_threads} threads"
    if r["STACK"] or r["LOCAL"]:
        yield f"{r['STACK']} bytes of stack, {r['LOCAL']} of local memory"
    if n := kernel.count(r"(LDL|STL)\b"):
        yield f"{n} accesses of local memory"


def check_instructions(kernel):
    """What a kernel that multiplies must have, and must not have."""
    if n := kernel.count(r"RED|ATOM[A-Z]*\..*(F16|F32|F64|BF16)"):
        yield f"{n} reductions in memory, or float atomics: the order of additions would be left to chance"
    atomics = kernel.count("ATOM")
    if atomics != (kernel.stem in COUNTING):
        yield f"{atomics} atomics; {', '.join(COUNTING)} have one, the counter of arrivals"
    if kernel.stem not in MULTIPLY:
        return
    kind = r"HMMA\.16816\.F32\.BF16$" if "true" in kernel.name else r"HMMA\.16816\.F32$"
    expected = products_of(kernel)
    if (n := kernel.count(kind)) != expected or kernel.count("HMMA") != n:
        yield f"{n} products m16n8k16 of {kernel.count('HMMA')}, expected {expected}"
    if n := in_main_loops(kernel, "I2F|F2F"):
        yield f"{n} conversions in main loops"
    if kernel.stem == "decode_kernel":
        return
    needed = {
        r"LDGSTS\.E\.BYPASS\.128": 7,  # planes of width 4 (4 a tile), 2 (2) and 1 (1)
        r"LDSM\.16\.M88\.4": 8 * 3 * kernel.token_tiles,
        r"LDS\.128": sum(range(1, 9)),
    }
    for opcode, least in needed.items():
        if (n := kernel.count(opcode)) < least:
            yield f"{n} instructions {opcode}, expected {least} or more"
    if n := kernel.count(r"LDGSTS\.E(\.BYPASS)?(\.LTC\w+)?$"):
        yield f"{n} asynchronous copies of 4 bytes"


def products_of(kernel):
    """Products m16n8k16 in the code."""
    if kernel.stem != "decode_kernel":
        # 8 widths, a whole supertile of 4 chunks and a single chunk, 4 products of 16 rows in each.
        return 8 * (4 + 1) * 4 * (WIDE_TILES if kernel.stem == "wide_kernel" else kernel.token_tiles)
    side, width = map(int, kernel.arguments[2:])
    # Up to 4 bits: a pair of supertiles, what is left of one, and, but for a fixed width, units of one. 4 products and
    # the sums of x in a chunk.
    chunks = 4 * (3 if width <= 4 else 1) if width > 0 else 4 * (4 * 4 + 4)
    chunks += 8 if width == 0 and side == 1 else 0  # groups narrower than a supertile
    return 5 * chunks * kernel.token_tiles


def in_main_loops(kernel, pattern):
    """Instructions in innermost loops that multiply."""
    graph = kernel.graph
    loops = [loop for loop in graph.loops if graph.count(loop.blocks, "HMMA")]
    inner = [a for a in loops if not any(b.blocks < a.blocks for b in loops)]
    return sum(graph.count(loop.blocks, pattern) for loop in inner)


def check_costs(kernel):
    """Instructions for each weight, flush and unit."""
    for bits, cost in sass.tile_costs(kernel).items():
        if cost.per_weight() > TILE[bits]:
            yield f"{bits} bits: {cost.per_weight():.3f} instructions for each weight, budget {TILE[bits]}"
        for zero, budget in FLUSH.items():
            if cost.flush[zero] > budget:
                yield f"{bits} bits, zeros {zero}: {cost.flush[zero]} instructions of a flush, budget {budget}"
        if cost.unit > UNIT:
            yield f"{bits} bits: {cost.unit} instructions of bookkeeping for a unit, budget {UNIT}"


def test_every_kernel_is_there(kernels):
    flags = ("false", "true")
    names = {f"grouped_kernel<{b}, {n}>" for b in flags for n in (1, 2, 4)} | {
        f"wide_kernel<{b}, {n}>" for b in flags for n in (1, 2)
    }
    names |= {f"decode_kernel<{b}, {n}, {w}>" for b in flags for n in ("1, 4", "1, 1", "2, 1") for w in range(-1, 9)}
    names |= {f"{stem}<{b}>" for stem in ("generic_kernel", "arrange_kernel") for b in flags}
    names |= {"dequantize_kernel", "embedding_kernel", "table_kernel"}
    for arch in {k.arch for k in kernels}:
        assert {k.name for k in kernels if k.arch == arch} == names


def test_resources(kernels):
    assert collect(kernels, check_resources) == []


def test_instructions(kernels):
    assert collect(kernels, check_instructions) == []


def test_costs(kernels):
    assert collect([k for k in kernels if k.stem == "grouped_kernel" and k.token_tiles == 1], check_costs) == []


def test_architectures(kernels):
    if "MPQ_CUDA_ARCHS" in os.environ:
        pytest.skip("MPQ_CUDA_ARCHS is set: not the default build")
    wanted = re.search(r'^CUDA_ARCHS = "(.*)"$', (ROOT / "setup.py").read_text(), re.M)[1].split(";")
    elf, ptx = sass_files.list_codes(LIBRARY)
    assert elf == {k.arch for k in kernels} == {int(re.match(r"\d+", a)[0]) for a in wanted}
    assert bool(ptx) == any(a.endswith("+PTX") for a in wanted)
    # PTX of one architecture runs on every later one: the newest machine code is not older than it.
    assert all(p <= max(elf) for p in ptx)
    assert LIBRARY.stat().st_size < 20e6


# ---- the checks can fail ----

NAME = "_ZN3mpq4cuda13linear_kernelILb0ELi1EEEvNS0_12LinearParamsE"
RESOURCES = {"REG": 154, "STACK": 0, "SHARED": 1024, "LOCAL": 0}


def made_up_width(bits):
    """SASS of one width: the loop over groups, the loop over tiles, a flush with its two kinds of zeros."""
    tile = (
        ["LDS.128 R32, [R71]"] * bits + ["LDSM.16.M88.4 R36, [R120]"] * 2 + ["HMMA.16816.F32 R40, R60, R36, R40"] * 16
    )
    flush = ["LDS.128 R32, [R117]"] + ["HADD2.F32 R63, -RZ, R36.H0_H0"] * 8
    return "\n".join(
        [
            f".L_x_{bits}0:",
            "        /*0008*/                   CS2R R72, SRZ ;",
            f".L_x_{bits}1:",
            *(f"        /*0010*/                   {line} ;" for line in tile),
            f"        /*0020*/              @!P0 BRA `(.L_x_{bits}1) ;",
            *(f"        /*0030*/                   {line} ;" for line in flush),
            f"        /*0040*/               @P1 BRA `(.L_x_{bits}2) ;",
            "        /*0050*/                   LDS.64 R38, [R38] ;",
            f".L_x_{bits}2:",
            f"        /*0060*/              @!P2 BRA `(.L_x_{bits}0) ;",
            "        /*0070*/                   BRA `(.L_x_998) ;",
        ]
    )


def made_up(change=lambda text: text, **resources):
    """A kernel of all widths and of what check_instructions() asks for, changed."""
    lines = ["LDGSTS.E.BYPASS.128 [R2], [R4.64]"] * 8 + ["ATOMG.E.ADD.STRONG.GPU PT, R2, [R2.64], R5"]
    lines += ["LDSM.16.M88.4 R36, [R120]"] * 8 + ["HMMA.16816.F32 R40, R60, R36, R40"] * 32
    text = "\n".join(
        [
            f".text.{NAME}:",
            ".L_x_0:",
            *(f"        /*0000*/                   {line} ;" for line in lines),
            *(f"        /*0001*/              @P{bits} BRA `(.L_x_{bits}0) ;" for bits in range(1, 9)),
            "        /*0002*/                   BRA `(.L_x_998) ;",
            *map(made_up_width, range(1, 9)),
            ".L_x_998:",
            "        /*0f00*/              @!P3 BRA `(.L_x_0) ;",
            "        /*0f10*/                   EXIT ;",
            ".L_x_999:",
            "        /*0f20*/                   BRA `(.L_x_999) ;",
        ]
    )
    ((symbol, parsed),) = sass_files.parse(change(text)).items()
    return sass.Kernel(sass_files.kernel_name(symbol), 90, parsed, RESOURCES | resources, 384)


def test_made_up_kernel_passes():
    kernel = made_up()
    assert kernel.name == "linear_kernel<false, 1>"
    for check in (check_resources, check_instructions, check_costs):
        assert list(check(kernel)) == []
    costs = sass.tile_costs(kernel)
    assert [costs[b].tile for b in range(1, 9)] == [b + 2 + 16 + 1 for b in range(1, 9)]
    assert costs[4].flush == {"none": 1 + 8 + 1 + 1 + 1, "int": 1 + 8 + 1 + 1 + 1 + 1}
    assert costs[4].per_weight(2, "int") == (23 + 13 / 2) / 128


@pytest.mark.parametrize(
    "resources,found",
    [
        ({"REG": 169}, "169 registers, budget 168"),
        ({"REG": 172}, "172 registers x 384 threads"),
        ({"STACK": 16}, "16 bytes of stack"),
        ({"LOCAL": 8}, "8 of local memory"),
    ],
)
def test_resources_can_fail(resources, found):
    assert any(found in wrong for wrong in check_resources(made_up(**resources)))


def replaced(old, new, count=-1):
    """A change of the made-up text that does change it."""

    def change(text):
        assert old in text
        return text.replace(old, new, count)

    return change


@pytest.mark.parametrize(
    "check,change,found",
    [
        (check_resources, replaced("LDS.64 R38, [R38]", "LDL R38, [R1]", 1), "1 accesses of local memory"),
        (check_resources, replaced("LDS.64 R38, [R38]", "STL.64 [R1], R38", 1), "1 accesses of local memory"),
        (check_instructions, replaced("LDS.64 R38, [R38]", "RED.E.ADD.F32.FTZ.RN [R2], R4", 1), "1 reductions"),
        (check_instructions, replaced("ATOMG.E.ADD.STRONG", "ATOMG.E.ADD.F32.FTZ.RN.STRONG"), "float atomics"),
        (check_instructions, replaced("ATOMG.E.ADD.STRONG.GPU PT, R2, [R2.64], R5", "NOP"), "0 atomics"),
        (check_instructions, replaced("HMMA.16816.F32 ", "HMMA.1688.F32 ", 1), "159 products m16n8k16 of 160"),
        (check_instructions, replaced("HMMA.16816.F32 ", "HMMA.16816.F32.BF16 "), "0 products"),
        (check_instructions, replaced("BYPASS.128", "64"), "0 instructions LDGSTS"),
        (check_instructions, replaced("LDGSTS.E.BYPASS.128", "LDGSTS.E", 1), "copies of 4 bytes"),
        (check_instructions, replaced("LDSM.16.M88.4", "LDSM.16.M88.2"), "0 instructions LDSM"),
        (check_instructions, replaced("LDS.128", "LDS.64"), "0 instructions LDS"),
        (check_instructions, replaced("LDSM.16.M88.4 R36, [R120]", "I2F R36, R120"), "16 conversions in main loops"),
    ],
)
def test_instructions_can_fail(check, change, found):
    assert any(found in wrong for wrong in check(made_up(change)))


LOP3 = "        /*0011*/                   LOP3.LUT R60, R32.reuse, 0x30003, RZ, 0xc0, !PT ;\n"


@pytest.mark.parametrize("bits", range(1, 9))
def test_costs_can_fail(bits):
    loop, flush = f".L_x_{bits}1:\n", f".L_x_{bits}2:\n"
    more = int(TILE[bits] * sass.WEIGHTS_PER_LANE) - (bits + 19)
    assert list(check_costs(made_up(replaced(loop, loop + LOP3 * more)))) == []
    (wrong,) = check_costs(made_up(replaced(loop, loop + LOP3 * (more + 1))))
    assert wrong.startswith(f"{bits} bits: ") and "instructions for each weight" in wrong
    wrong = list(check_costs(made_up(replaced(flush, flush + LOP3 * FLUSH["int"]))))
    assert [w.split(":")[0] for w in wrong] == [f"{bits} bits, zeros none", f"{bits} bits, zeros int"]
    wrong = list(check_costs(made_up(replaced(".L_x_0:\n", ".L_x_0:\n" + LOP3 * UNIT))))
    assert len(wrong) == 8 and all("bookkeeping" in w for w in wrong)


def test_loop_that_is_not_understood():
    with pytest.raises(sass.SassError, match="second or strange loop with 1 loads"):
        sass.tile_costs(
            made_up(
                replaced(
                    ".L_x_21:\n        /*0010*/                   LDS.128",
                    ".L_x_21:\n        /*0010*/                   LDS.64",
                )
            )
        )
    with pytest.raises(sass.SassError, match="main loops of the widths"):
        sass.tile_costs(made_up(replaced("HMMA.16816.F32 R40", "NOP ;\n/**/", 33)))


def test_resource_usage_is_read():
    text = (
        f"arch = sm_90\n\nResource usage:\n Function {NAME}:\n  REG:154 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:3984\n"
    )
    assert sass_files.parse_resources(text) == {NAME: {90: RESOURCES | {"STACK": 8}}}
