"""Compiles the Triton kernels for devices that are not there, and counts what the generated code does.

    python tests/backends/triton/compiled.py [architecture ...]     prints the table of docs/triton.md

A row is one kernel for one architecture: registers, spilled bytes, shared memory, and the paths by which weights could
pass through shared memory: on sm_90 operand A must stay in registers, so that the only copies into shared memory inside
the loop are those of x and of one scale for each row.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mpq_kernels.backends.triton import configs
from mpq_kernels.backends.triton.dense import dequantize_kernel, slow_kernel
from mpq_kernels.backends.triton.linear import linear_kernel, reduce_kernel
from mpq_kernels.backends.triton.unpack import BF16, FP16, PTX_BF16, PTX_FP16
from mpq_kernels.format.kinds import KINDS, ZERO_KINDS

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
POINTERS = {
    "x": "x", "qweight": "i32", "scales": "fp16", "zeros": "zeros", "perm": "i32", "bias": "x", "offsets": "i32",
    "y": "x", "partial": "fp32", "items": "i32", "blocks": "i32", "out": "x",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One kernel with its constants. kinds: (bits, kind of zeros); several: one launch of mixed widths."""

    name: str
    kernel: Any
    kinds: tuple[tuple[int, str], ...] = ((4, "int"),)
    dtype: str = "bf16"
    block_m: int = 16
    step: int = 64
    grouped: bool = False

    @property
    def label(self) -> str:
        """Name in the table."""
        widths = "+".join(str(bits) for bits, _ in self.kinds)
        zero = self.kinds[0][1]
        shape = "" if self.name in ("dequantize", "reduce") else f", {self.block_m} tokens, steps of {self.step}"
        return f"{self.name} {widths} bits, {zero} zeros, {self.dtype}{shape}" if self.name != "reduce" else "reduce"


CASES = (
    *(Case("linear", linear_kernel, ((bits, "int"),)) for bits in range(1, 9)),
    Case("linear", linear_kernel, ((4, "none"),), "fp16"),
    Case("linear", linear_kernel, ((4, "float"),)),
    Case("linear", linear_kernel, ((4, "int"),), block_m=32),
    Case("linear", linear_kernel, ((7, "int"),), block_m=32),
    Case("linear", linear_kernel, ((3, "int"),), step=32),
    Case("linear", linear_kernel, ((2, "int"), (3, "int"), (4, "int")), block_m=32),
    Case("experts", linear_kernel, ((2, "int"), (4, "int")), grouped=True),
    Case("any group", slow_kernel, ((3, "int"),)),
    Case("dequantize", dequantize_kernel, ((3, "int"),)),
    Case("dequantize", dequantize_kernel, ((8, "float"),)),
    Case("reduce", reduce_kernel),
)


@dataclass(frozen=True)
class Counts:
    """What was generated."""

    registers: int
    spills: int  # bytes; NVIDIA: local memory loads and stores, AMD: spilled registers
    shared: int  # bytes
    wgmma: int
    operand_moves: int  # operand A of a dot copied through shared memory or between lanes
    stores_in_loop: int  # instructions that write shared memory in the smallest loop with a tensor-core instruction


def compile_case(case: Case, arch: str) -> Any:
    """triton's compiled kernel."""
    target = TARGETS[arch]
    names = case.kernel.arg_names
    kinds = 0
    for bits, zero in case.kinds:
        kinds |= 1 << ((bits - 1) * len(ZERO_KINDS) + ZERO_KINDS.index(zero))
    key = f"{target.backend}:{target.arch}"
    ptx = target.backend == "cuda"
    math = (PTX_FP16 if ptx else FP16) if case.dtype == "fp16" else (PTX_BF16 if ptx else BF16)
    warps = 1 if case.kernel is slow_kernel else 4
    step = min(case.step, configs.widest_step(key, VERSION, case.block_m))
    stages = configs.choose(configs.Device("", key, 1), case.block_m, {}).num_stages
    constants = {
        "KINDS": kinds, "STEP": step, "STAGES": stages, "S": warps,
        "BLOCK_M": 4 if case.kernel is reduce_kernel else case.block_m,
        "NATURAL": configs.natural_columns(key, VERSION), "HAS_PERM": False, "HAS_BIAS": True, "EVEN": True,
        "MATH": math, "GROUPED": case.grouped, "COARSE": True,
    }  # fmt: skip
    zeros = "u8" if KINDS[case.kinds[0][1]].stored == "uint8" else "fp16"
    types = {"x": case.dtype, "zeros": zeros}
    signature = {
        name: "constexpr"
        if name in constants
        else f"*{types.get(POINTERS[name], POINTERS[name])}"
        if name in POINTERS
        else "i32"
        for name in names
    }
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (i,): aligned for i, name in enumerate(names) if signature[name] != "constexpr" and name != "num_tokens"
    }
    source = ASTSource(
        fn=case.kernel, signature=signature, attrs=attributes,
        constexprs={name: constants[name] for name in names if name in constants},
    )  # fmt: skip
    options = {"num_warps": 4, "num_stages": stages, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def count(compiled: Any, arch: str) -> Counts:
    """Numbers of one compiled kernel."""
    moves = operand_moves(compiled.asm["ttgir"])
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
        stores = stores_of(smallest_loop(text))
        return Counts(registers, spills, compiled.metadata.shared, 0, moves, stores)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    loop = smallest_loop(sass)
    spills = numbers["LOCAL"] + numbers["STACK"]
    stores = stores_of(loop)
    wgmma = compiled.asm["ptx"].count("wgmma.mma_async")
    return Counts(numbers["REG"], spills, compiled.metadata.shared, wgmma, moves, stores)


def operand_moves(ttgir: str) -> int:
    """Conversions of operand A that are more than a new name for the same registers.

    Operand A comes from a reshape of joined fields; a conversion of it is free when it stays in the thread, which the
    code of the loop shows (`stores_in_loop`). A local_load or local_alloc of it is not.
    """
    return len(re.findall(r"ttg\.local_load .*opIdx = 0", ttgir)) + len(
        re.findall(r"ttg\.local_alloc %\S+ : \(tensor<(?:64|256)x(?:16|32|64)x(?:f16|bf16), #linear", ttgir)
    )


def stores_of(code: list[str]) -> int:
    """How many instructions write shared memory."""
    return sum(bool(re.search(r"\b(STS|STSM)\b|\bds_write", line)) for line in code)


def smallest_loop(assembly: str) -> list[str]:
    """Instructions of the shortest loop with a tensor-core instruction, of SASS or of AMD's assembly."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_x_\d+|\.LBB\d+_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);|\t([a-z]\w+\s.*)", line):
            code.append(instruction[1] or instruction[2])
    loops = []
    for end, text in enumerate(code):
        branch = re.search(r"(?:BRA|s_c?branch).*?(\.L_x_\d+|\.LBB\d+_\d+)", text)
        if branch and labels.get(branch[1], end + 1) <= end:
            body = code[labels[branch[1]] : end + 1]
            if any("MMA" in line or "mfma" in line for line in body):
                loops.append(body)
    return min(loops, key=len, default=[])


def tool(name: str, *arguments: str) -> str:
    """Output of one of the binaries that triton brings."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def table(arches: tuple[str, ...] = tuple(TARGETS), cases: tuple[Case, ...] = CASES) -> list[str]:
    """Markdown."""
    lines = [
        "| architecture | kernel | registers | spilled bytes | shared memory, bytes | wgmma "
        "| operand A through shared memory | stores to shared memory in the loop |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arch in arches:
        for case in cases:
            c = count(compile_case(case, arch), arch)
            values = (arch, case.label, c.registers, c.spills, c.shared, c.wgmma, c.operand_moves, c.stores_in_loop)
            lines.append(f"| {' | '.join(map(str, values))} |")
    return lines


if __name__ == "__main__":
    print(f"triton {triton.__version__}\n")
    print("\n".join(table(tuple(sys.argv[1:]) or tuple(TARGETS))))
