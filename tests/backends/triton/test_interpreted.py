"""The Triton backend under the interpreter, in processes of their own: `RUNS`."""

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
# What a process runs: a file beside this one, or the tests of the table of backends, which skip triton elsewhere.
RUNS = {
    "cases": [str(TESTS / "cases.py")],
    "agreement": [str(TESTS / "agreement.py")],
    "table": [
        "tests/backends/test_select.py::test_every_backend_agrees_with_the_reference[triton]",
        "tests/backends/test_select.py::test_a_backend_says_why_not[triton]",
        "tests/nn/test_linear.py::test_compile_whole_graph_with_any_number_of_tokens[triton]",
    ],
}


@pytest.fixture(scope="module")
def processes():
    """Name -> pytest over its tests, all at once: the interpreter keeps one processor busy."""
    running = {}
    for name, tests in RUNS.items():
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        running[name] = subprocess.Popen(
            command, env=environment, cwd=TESTS.parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    yield running
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", RUNS)
def test_kernels_under_the_interpreter(processes, name):
    output, _ = processes[name].communicate()
    assert processes[name].returncode == 0, output[-8000:]
    assert " passed" in output and "skipped" not in output
