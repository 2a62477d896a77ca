"""Comments and docstrings name files that exist: a file that moves takes its mentions along."""

import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("mpq_kernels", "benchmarks", "examples", "tests", "csrc")
PYTHON, C = (".py",), (".h", ".inl", ".cpp", ".cu", ".cuh")
# No files of the checkout: what the build writes, and what the readers of foreign plans say of other programs.
BUILT = "generated/layout.h"
FOREIGN = ROOT / "mpq_kernels" / "plan" / "foreign"
NAMED = re.compile(r"(?<![\w.*<>{}/-])((?:[\w-]+/)*[\w-]+(?:\.py|\.h|\.inl|\.cpp|\.cuh?|\.sh))\b(?![\w(])")
C_COMMENT = re.compile(r"/\*(.*?)\*/|//([^\n]*)", re.S)


def sources():
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in PYTHON + C)
    left_out = {"build", "generated"}
    return sorted(path for path in found if not left_out & set(path.parts) and FOREIGN not in path.parents)


EXISTING = [str(path.relative_to(ROOT)) for path in sources()] + ["setup.py", "benchmarks/run_gpu.sh"]


def prose(path):
    """Text of the comments and docstrings of a file."""
    if path.suffix in C:
        return "\n".join("".join(parts) for parts in C_COMMENT.findall(path.read_text()))
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    docs = [t.string for t in tokens if t.type == tokenize.STRING and t.string.startswith('"""')]
    return "\n".join([t.string for t in tokens if t.type == tokenize.COMMENT] + docs)


def strangers(path):
    """Files that a file's prose names and nobody has: by the end of the path, from its folder or from the root."""
    named = {name for name in NAMED.findall(prose(path)) if not name.endswith(BUILT) and "NAME" not in name}
    return {name for name in named if not any(f"/{known}".endswith(f"/{name}") for known in EXISTING)}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(path):
    assert not strangers(path)


def test_a_stranger_is_found(tmp_path):
    (tmp_path / "a.py").write_text('"""See nowhere/lost.py and setup.py."""\n# gone.cuh\nx = "kept.py"\n')
    assert strangers(tmp_path / "a.py") == {"nowhere/lost.py", "gone.cuh"}
    (tmp_path / "a.inl").write_text("// lost.inl, cpu/cpu.h\nint x;  /* gone.cu */\n")
    assert strangers(tmp_path / "a.inl") == {"lost.inl", "gone.cu"}
