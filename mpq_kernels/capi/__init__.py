"""Where C and C++ programs find the headers and the libraries of the kernels, which know neither torch nor Python.

    include/                      mpq.h, mpq_cpu.h, mpq_model.h
    lib/libmpq_cpu.so             kernels of the CPU, and the reader of packed directories
    lib/libmpq_cuda.so            kernels of CUDA, where nvcc was there when the package was built
    lib/pkgconfig, lib/cmake/mpq  for `pkg-config mpq_cpu` and `find_package(mpq)`

Imports nothing of the package but its errors; gives paths. Source: docs/plugging_in.md.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UnsupportedError

__all__ = ["cmake_dir", "include_dir", "library", "library_dir", "pkgconfig_dir"]

ROOT = Path(__file__).parent


def include_dir() -> Path:
    """Folder of the headers."""
    return ROOT / "include"


def library_dir() -> Path:
    """Folder of the libraries."""
    return ROOT / "lib"


def pkgconfig_dir() -> Path:
    """For PKG_CONFIG_PATH."""
    return library_dir() / "pkgconfig"


def cmake_dir() -> Path:
    """For mpq_DIR."""
    return library_dir() / "cmake" / "mpq"


def library(name: str = "cpu") -> Path:
    """Path of libmpq_cpu.so or libmpq_cuda.so. Raises UnsupportedError when it was not built."""
    path = library_dir() / f"libmpq_{name}.so"
    if not path.exists():
        needs = "nvcc and a C++20 compiler" if name == "cuda" else "a C++20 compiler"
        raise UnsupportedError(f"{path.name} is missing in {path.parent}: build the package with {needs}")
    return path
