"""The standalone C++ tests of the CPU kernels: what a test through torch cannot see.

Red zones around y and the workspace, poisoned padding, odd pointers, simulated tile registers. `make sanitize`
(MPQ_TEST_SANITIZE=1) runs the same under the address and undefined-behaviour sanitizers, minutes to compile.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.made.cpu_sources import cpu_sources, isa_flags

ROOT = Path(__file__).parents[3]
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O1", "-g0", "-ffp-contract=off"]
if os.environ.get("MPQ_TEST_SANITIZE"):
    FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / "csrc/generated/layout.h").exists(), reason="needs the source tree it was built from"
    ),
]


def build(sources: list[Path], folder: Path) -> list[str]:
    """Object files of the sources, each with the flags of its instruction set."""

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        flags = [*FLAGS, *isa_flags(source), f"-I{ROOT / 'csrc'}"]
        subprocess.run([COMPILER, *flags, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Objects of csrc/cpu."""
    return build(cpu_sources(), tmp_path_factory.mktemp("kernels"))


def passes(name: str, kernels: list[str], folder: Path, others: tuple[str, ...] = ()) -> str:
    """What the program of tests/cpp prints; it must not count a failure."""
    own = [ROOT / f"tests/cpp/{stem}.cpp" for stem in (name, *others)]
    program = str(folder / name)
    objects = [*kernels, *build(own, folder)]
    subprocess.run([COMPILER, *FLAGS, *objects, "-pthread", "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    sys.stdout.write(result.stdout)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert ", 0 failures" in result.stdout
    return result.stdout


def test_standalone_kernel_checks(kernels, tmp_path):
    assert "portable: checked" in passes("test_cpu_kernels", kernels, tmp_path)


def test_tile_registers_give_the_same_bits(kernels, tmp_path):
    """Simulated ones everywhere; those of the processor, or its traps, as far as it has them."""
    assert "amx: " in passes("test_tiles", kernels, tmp_path, ("simulated_amx",))
