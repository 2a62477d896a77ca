"""The C++ files of csrc/cpu that are compiled on this machine, and their compiler flags, as setup.py reads them."""

import platform
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
X86 = platform.machine().lower() in ("x86_64", "amd64")


def isa_flags(source: Path) -> list[str]:
    """Flags of the instruction set that a file of csrc/cpu/instances names."""
    found = re.search(r"^// x86-64 flags: (.*)$", source.read_text(), re.MULTILINE)
    return found[1].split() if found else []


def cpu_sources() -> list[Path]:
    """All but those of an instruction set of x86-64 elsewhere."""
    return [p for p in sorted((ROOT / "csrc/cpu").rglob("*.cpp")) if X86 or not isa_flags(p)]
