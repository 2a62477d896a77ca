"""The handlers of handlers.cpp: compiled when they are first used, kept, and made known to XLA.

Why not when the package is built: they need the headers of jaxlib, which those who use torch alone should not install
to build a wheel; and so the headers are those of the jaxlib that loads the result. It takes three seconds, once:

    $XDG_CACHE_HOME/mpq_kernels/jax/<key>/handlers.so      key: all that the result depends on, see `_key`
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax

from .. import capi
from ..errors import UnsupportedError
from ..format.codes import LAYOUT_ID

SOURCE = Path(__file__).with_name("handlers.cpp")
OPERATIONS = ("linear", "grouped_linear", "embedding", "dequantize")
PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}  # suffix of the handlers' names -> what XLA calls it
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility-inlines-hidden")


@cache
def platforms() -> tuple[str, ...]:
    """Those that the package was built for, of PLATFORMS."""
    built = []
    for name in PLATFORMS:
        try:
            capi.library(name)
        except UnsupportedError:
            if name == "cpu":
                raise
            continue
        built.append(name)
    return tuple(built)


@cache
def register() -> None:
    """Makes the operations known to XLA, as targets "mpq_<operation>_<platform>". Compiles them where that is new.

    Raises UnsupportedError when there is no C++ compiler, or it refuses.
    """
    library = ctypes.CDLL(str(compiled()))
    for name in platforms():
        for operation in OPERATIONS:
            handler = getattr(library, f"mpq_jax_{operation}_{name}")
            capsule = jax.ffi.pycapsule(handler)
            jax.ffi.register_ffi_target(f"mpq_{operation}_{name}", capsule, platform=PLATFORMS[name])


def compiled() -> Path:
    """The shared library of the handlers, compiled first where the cache does not have it. Raises UnsupportedError."""
    target = cache_dir() / _key() / "handlers.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            _compile(made)
            os.replace(made, target)  # complete or absent, whoever else is at it
    return target


def cache_dir() -> Path:
    """Folder of what was compiled."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpq_kernels" / "jax"


def _command() -> list[str]:
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if found is None:
        raise UnsupportedError(
            "mpq_kernels.jax compiles its handlers when it is first used and needs a C++ compiler: g++"
        )
    folders = [f"-isystem{jax.ffi.include_dir()}", f"-I{capi.include_dir()}", f"-L{capi.library_dir()}"]
    libraries = [f"-lmpq_{name}" for name in platforms()]
    cuda = ["-DMPQ_JAX_CUDA"] if "cuda" in platforms() else []
    return [found, *FLAGS, *cuda, *folders, str(SOURCE), *libraries, f"-Wl,-rpath,{capi.library_dir()}"]


def _key() -> str:
    """Digest of the command, the source, the headers' versions, and the machine."""
    parts = [*_command(), SOURCE.read_text(), version("jaxlib"), LAYOUT_ID, platform.machine()]
    parts += [(capi.include_dir() / name).read_text() for name in ("mpq.h", "mpq_cpu.h")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _compile(target: Path) -> None:
    done = subprocess.run([*_command(), "-o", str(target)], capture_output=True, text=True)
    if done.returncode:
        raise UnsupportedError(
            f"the handlers for jaxlib {version('jaxlib')} were not compiled; the compiler says:\n{done.stderr[-2000:]}"
        )
