"""Reads the machine code of a CUDA library with cuobjdump and nvdisasm. What is in it: sass.py.

    library --cuobjdump -xelf--> one cubin for each source and architecture --nvdisasm -c--> text --parse()--> Kernel

Both programs come with the triton wheel (triton/backends/nvidia/bin) and with the CUDA toolkit. No GPU is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.sass import Instruction, Kernel


def find_tool(name: str) -> str | None:
    """Path of cuobjdump or nvdisasm: of the triton package, of CUDA_HOME, of the PATH; None where there is none."""
    folders = []
    try:
        import triton

        folders.append(Path(triton.__file__).parent / "backends/nvidia/bin")
    except ImportError:
        pass
    if "CUDA_HOME" in os.environ:
        folders.append(Path(os.environ["CUDA_HOME"]) / "bin")
    return next((found for f in folders if (found := shutil.which(str(f / name)))), None) or shutil.which(name)


def kernel_name(symbol: str) -> str | None:
    """Mangled name -> "linear_kernel<false, 1>"; None for what is not a kernel."""
    match = re.search(r"\d([a-z]+_kernel)(?:I((?:L[bi]\d+E)+)E)?", symbol)
    if not match:
        return None
    stem, given = match.groups()
    arguments = [("false", "true")[int(value)] if kind == "b" else value
                 for kind, value in re.findall(r"L([bi])(\d+)E", given or "")]  # fmt: skip
    return f"{stem}<{', '.join(arguments)}>" if arguments else stem


LINE = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\d+|!?U?PT)\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?)\s*;")
UPPER = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/\s*$")  # the second half of an encoding, on a line of its own
TARGETS = re.compile(r"\.L_x_\d+")


def parse(text: str) -> dict[str, list[Instruction | str]]:
    """Output of nvdisasm -c, with or without -hex: symbol -> its instructions and labels (those of functions too)."""
    functions: dict[str, list[Instruction | str]] = {}
    lines: list[Instruction | str] = []
    for line in text.splitlines():
        if line.startswith(".text."):
            lines = functions.setdefault(line[6:].rstrip(":"), [])
        elif line.startswith((".L_x_", "$")):
            lines.append(line.rstrip(":"))
        elif match := LINE.match(line):
            targets = () if ".L_x_" not in line else tuple(TARGETS.findall(line))
            lines.append(Instruction(match[2] or "", match[3], match[4], targets, int(match[1], 16)))
        elif match := UPPER.match(line):
            assert isinstance(lines[-1], Instruction)
            lines[-1] = replace(lines[-1], control=int(match[1], 16) >> 41)
    return functions


def parse_resources(text: str) -> dict[str, dict[int, dict[str, int]]]:
    """Output of cuobjdump --dump-resource-usage: symbol -> architecture -> REG, STACK, SHARED, LOCAL."""
    usage: dict[str, dict[int, dict[str, int]]] = {}
    arch, symbol = 0, ""
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
        elif "REG:" in line:
            values = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            usage.setdefault(symbol, {})[arch] = values
    return usage


def sections(cubin: bytes) -> dict[str, bytes]:
    """Sections of the ELF by name."""
    offset, entry, count, names = struct.unpack_from("<Q10xHHH", cubin, 40)
    headers = [struct.unpack_from("<II2Q2Q", cubin, offset + i * entry) for i in range(count)]
    found = {}
    for name, kind, _, _, begin, size in headers:
        at = headers[names][4] + name
        found[cubin[at : cubin.index(b"\0", at)].decode()] = cubin[begin : begin + size] if kind != 8 else b""
    return found


def max_threads(cubin: bytes) -> dict[str, int]:
    """Symbol -> threads that __launch_bounds__ allows: EIATTR_MAX_THREADS in sections .nv.info.<symbol> of the ELF."""
    found = {}
    for title, content in sections(cubin).items():
        if not title.startswith(".nv.info."):
            continue
        place = 0
        while place < len(content):
            form, attribute, value = struct.unpack_from("<BBH", content, place)
            place += 4
            if form == 4:  # `value` bytes follow
                if attribute == 5:
                    found[title[9:]] = struct.unpack_from("<I", content, place)[0]
                place += value
    return found


def run(*command: str, cwd: Path | None = None) -> str:
    """Output of a program that succeeds."""
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def list_codes(library: Path) -> tuple[set[int], set[int]]:
    """Architectures of the machine code, and of the PTX, that a library holds."""
    tool = find_tool("cuobjdump")
    assert tool
    codes = (run(tool, option, str(library)) for option in ("--list-elf", "--list-ptx"))
    elf, ptx = ({int(n) for n in re.findall(r"\.sm_(\d+)", text)} for text in codes)
    return elf, ptx


def read_kernels(library: Path) -> list[Kernel]:
    """Every kernel of every architecture in a library, by architecture and name."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    assert cuobjdump and nvdisasm
    usage = parse_resources(run(cuobjdump, "--dump-resource-usage", str(library)))
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        run(cuobjdump, "-xelf", "all", str(library.resolve()), cwd=Path(folder))
        cubins = sorted(Path(folder).glob("*.cubin"), key=lambda p: -p.stat().st_size)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            texts = pool.map(lambda cubin: run(nvdisasm, "-c", "-ndf", str(cubin)), cubins)
            for cubin, text in zip(cubins, texts, strict=True):
                arch = int(cubin.suffixes[-2][4:])
                threads = max_threads(cubin.read_bytes())
                for symbol, lines in parse(text).items():
                    if name := kernel_name(symbol):
                        kernels.append(Kernel(name, arch, lines, usage[symbol][arch], threads[symbol]))
    return sorted(kernels, key=lambda k: (k.arch, k.name))
