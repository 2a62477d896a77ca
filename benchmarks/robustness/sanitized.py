"""The campaign on operators that were built under the address and undefined-behaviour sanitizers.

    python -m benchmarks.robustness.sanitized operators numbers --cases 2000     arguments as of benchmarks.robustness

The first run builds them into build/sanitized, which takes minutes. A report of a sanitizer ends the process of its
case, which is then counted as a failure, and is printed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitized"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
# Leaks are those of Python; what is too large to allocate is an error of torch's, as without a sanitizer.
OPTIONS = "exitcode=77:detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=32:max_allocation_size_mb=4096"


def build() -> Path:
    """A folder whose `mpq_kernels` is this package with libraries built under sanitizers."""
    environment = os.environ | {"CXX": f"{COMPILER} {FLAGS}", "MPQ_CUDA_ARCHS": "none"}
    words = ["build_ext", "--build-lib", str(BUILD / "lib"), "--build-temp", str(BUILD / "objects")]
    subprocess.run([sys.executable, "setup.py", "-q", *words], cwd=ROOT, env=environment, check=True)
    package = BUILD / "lib" / "mpq_kernels"
    for path in (ROOT / "mpq_kernels").iterdir():
        link = package / path.name
        if path.suffix != ".so" and not os.path.lexists(link):
            link.symlink_to(path)
    (BUILD / "lib" / "benchmarks").unlink(missing_ok=True)
    (BUILD / "lib" / "benchmarks").symlink_to(ROOT / "benchmarks")
    return BUILD / "lib"


def _file_of(library: str) -> str:
    words = [COMPILER, f"-print-file-name={library}"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """The exit code of the campaign."""
    folder = build()
    # The second before its first user is loaded, or the sanitizer does not find what it wraps of it.
    libraries = " ".join(_file_of(name) for name in ("libasan.so", "libstdc++.so.6"))
    environment = os.environ | {"LD_PRELOAD": libraries, "ASAN_OPTIONS": OPTIONS, "OMP_NUM_THREADS": "1"}
    environment |= {"UBSAN_OPTIONS": "print_stacktrace=1", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-P", "-m", "benchmarks.robustness", *sys.argv[1:]]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
