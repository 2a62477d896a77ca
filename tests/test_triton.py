"""The Triton backend: tests/triton_cases.py in a process under the interpreter, and what needs no triton at all."""

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


@pytest.mark.skipif(
    find_spec("triton") is not None and versions("triton") < (3, 7) and versions("numpy") >= (2, 4),
    reason="the interpreter of triton 3.6 makes ints of one-element arrays, which numpy 2.4 refuses (numpy<2.4)",
)
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install triton)")
def test_kernels_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(TESTS / "triton_cases.py")]
    result = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout
