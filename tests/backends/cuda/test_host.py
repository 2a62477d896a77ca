"""C++ of the CUDA backend that needs no device: tests/cpp/test_counters.cpp, tests/cpp/test_cut_work.cpp."""

import os
import subprocess

import pytest

from tests.backends.cuda.simulator import ROOT

SOURCES = {"test_counters": (), "test_cut_work": ("csrc/cuda/cut_work.cpp",)}


@pytest.mark.parametrize("name", SOURCES)
def test_program(name, tmp_path):
    program, sources = tmp_path / name, [f"tests/cpp/{name}.cpp", *SOURCES[name]]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *flags, *(str(ROOT / source) for source in sources), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
