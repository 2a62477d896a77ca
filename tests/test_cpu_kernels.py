"""The standalone C++ test of the CPU kernels: what a test through torch cannot see.

Red zones around y and the workspace, poisoned padding, odd pointers. `make sanitize` (MPQ_TEST_SANITIZE=1) runs the
same under the address and undefined-behaviour sanitizers, which takes minutes to compile.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++20", "-O1", "-g0", "-ffp-contract=off"]
if os.environ.get("MPQ_TEST_SANITIZE"):
    FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"-mavx512f -mavx512bw -mavx512vl -mavx512dq {AVX2}"
ISA_FLAGS = {
    "kernels_avx2": AVX2,
    "kernels_avx512": AVX512,
    "int8_avx2": AVX2,
    "int8_avxvnni": f"{AVX2} -mavxvnni",
    "int8_avx512": AVX512,
    "int8_avx512vnni": f"{AVX512} -mavx512vnni",
}


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "csrc/generated/layout.h").exists(), reason="needs the source tree it was built from")
def test_standalone_kernel_checks(tmp_path):
    compiler = os.environ.get("CXX", "g++")
    sources = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), ROOT / "tests/cpp/test_cpu_kernels.cpp"]

    def build(source: Path) -> str:
        target = str(tmp_path / f"{source.stem}.o")
        flags = [*FLAGS, *ISA_FLAGS.get(source.stem, "").split(), f"-I{ROOT / 'csrc'}"]
        subprocess.run([compiler, *flags, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(build, sources))
    program = str(tmp_path / "test_cpu_kernels")
    subprocess.run([compiler, *FLAGS, *objects, "-pthread", "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    sys.stdout.write(result.stdout)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert ", 0 failures" in result.stdout and "portable: checked" in result.stdout
