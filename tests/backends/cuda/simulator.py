"""The simulator of csrc/sim by ctypes: builds a library of kernels, allows memory, reads errors and counts."""

import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[3]
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-DMPQ_SIM", f"-I{ROOT / 'csrc'}"]
WRITABLE, UNDEFINED, INPUT = 1, 2, 4
FORWARD, REVERSE, RANDOM = 0, 1, 2
COUNTS = ("blocks", "mmas", "cp_async_bytes", "bulk_bytes", "unwaited_copies")
CHECK_FAILED = 9001


def build(folder: Path, kernels: list[Path], *flags: str) -> ctypes.CDLL:
    """A library of the kernel sources and the simulator, with its functions declared."""
    compiler = os.environ.get("CXX", "g++")

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run([compiler, *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*sorted((ROOT / "csrc/sim").glob("*.cpp")), *kernels]))
    path = folder / "simulated.so"
    subprocess.run([compiler, "-shared", *flags, *objects, "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.mpq_sim_allow.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_char_p]
    library.mpq_sim_order.argtypes = [ctypes.c_int, ctypes.c_uint32]
    library.mpq_sim_error.restype = ctypes.c_char_p
    library.mpq_sim_count.restype = ctypes.c_uint64
    return library


def allow(library: ctypes.CDLL, array: np.ndarray, flags: int, name: str) -> None:
    """Kernels may use the bytes of the array, which the caller keeps alive."""
    library.mpq_sim_allow(array.ctypes.data, array.nbytes, flags, name.encode())


def counts(library: ctypes.CDLL) -> dict[str, int]:
    """Counters of the last launch."""
    return {name: library.mpq_sim_count(i) for i, name in enumerate(COUNTS)}
