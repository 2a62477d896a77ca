"""One kernel of a library or a cubin, with its constants, ready for the emulator."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.model.emulator import Emulator
from benchmarks.gpu.model.phases import phases_of
from benchmarks.gpu.model.program import Program
from benchmarks.gpu.sass import SassError
from benchmarks.gpu.sass_files import find_tool, kernel_name, parse, run, sections


@dataclass(frozen=True)
class Code:
    """A kernel: instructions, the emulator that has compiled some of them, a phase for each, constant banks above 0."""

    program: Program
    emulator: Emulator
    phases: tuple[str, ...]
    constants: dict[int, bytes]


def code_of(text: str, symbol: str, found: dict[str, bytes]) -> Code:
    """From what nvdisasm -hex -c prints. found: sections of the ELF, for constants."""
    program = Program(parse(text)[symbol])
    names = {n: f".nv.constant{n}.{symbol}" for n in range(1, 6)}
    constants = {n: found[name] for n, name in names.items() if name in found}
    return Code(program, Emulator(program), tuple(phases_of(program, "decode_kernel" in symbol)), constants)


@contextmanager
def _cubins(path: Path, arch: int | None) -> Iterator[list[Path]]:
    """Cubins of a library, of one architecture; a cubin is itself."""
    if path.suffix == ".cubin":
        yield [path]
        return
    tool = find_tool("cuobjdump")
    assert tool
    with tempfile.TemporaryDirectory() as folder:
        run(tool, "-xelf", f"sm_{arch}.", str(path.resolve()), cwd=Path(folder))
        yield sorted(Path(folder).glob("*.cubin"))


def read_code(path: Path, kernel: str, arch: int | None = None) -> Code:
    """The kernel of a name as in sass_files.py, or a part of its symbol. Raises SassError where there is none."""
    tool = find_tool("nvdisasm")
    assert tool
    with _cubins(path, arch) as cubins:
        for cubin in cubins:
            found = sections(cubin.read_bytes())
            symbols = [name[6:] for name in found if name.startswith(".text.")]
            fitting = [s for s in symbols if kernel_name(s) == kernel or kernel in s]
            if fitting:
                text = run(tool, "-c", "-ndf", "-hex", str(cubin))
                begin = text.index(f"\n.text.{fitting[0]}:") + 1
                end = text.find("\n//-----", begin)
                return code_of(text[begin : end if end >= 0 else None], fitting[0], found)
    raise SassError(f"{path.name} has no kernel {kernel}" + (f" for sm_{arch}" if arch else ""))
