"""The counters of the CUDA operators, over a machine without a driver (tests/cpp/test_counters.cpp)."""

import os
import subprocess

from tests.backends.cuda.simulator import ROOT


def test_calls_that_may_overlap_never_share_counters(tmp_path):
    program = tmp_path / "test_counters"
    source = ROOT / "tests/cpp/test_counters.cpp"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
