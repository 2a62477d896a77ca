"""The Triton backend under the interpreter: cases.py and agreement.py beside this file, in processes of their own."""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def versions(package):
    return tuple(int(part) for part in version(package).split(".")[:2])


pytestmark = [
    pytest.mark.skipif(
        find_spec("triton") is not None and versions("triton") < (3, 7) and versions("numpy") >= (2, 4),
        reason="the interpreter of triton 3.6 makes ints of one-element arrays, which numpy 2.4 refuses (numpy<2.4)",
    ),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install triton)"),
]
FILES = ("cases.py", "agreement.py")


@pytest.fixture(scope="module")
def processes():
    """File -> pytest over it, all at once: the interpreter keeps one processor busy."""
    running = {}
    for file in FILES:
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(TESTS / file)]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        running[file] = subprocess.Popen(
            command, env=environment, cwd=TESTS.parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    yield running
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("file", FILES)
def test_kernels_under_the_interpreter(processes, file):
    output, _ = processes[file].communicate()
    assert processes[file].returncode == 0, output[-8000:]
    assert " passed" in output and "skipped" not in output
