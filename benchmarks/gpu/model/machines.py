"""Every constant of the model, with where it is from. "assumed": a guess of the usual size; docs/kernels.md says how
far the result depends on the guesses.

Cycles are those of the multiprocessor's clock. Rates of pipes: cycles for which one instruction of a warp keeps the
pipe of its scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

KB = 1024
GRAPH_NODE_US = 1.2  # between two kernels of a CUDA graph; assumed

# Pipes of one scheduler: cycles for one instruction of 32 lanes.
# int32, float32 and half: lanes of the white papers of GA100 and GH100 (64 int32, 64 or 128 float32 lanes on a
# multiprocessor). IMAD: half the rate of FFMA from sm_86 on; assumed. uniform, branch, memory (one address unit for
# four schedulers, here a queue of each): assumed. special: 4 lanes on a scheduler (CUDA programming guide, arithmetic
# throughput). tensor: m16n8k16 of fp16 with fp32 sums, 1024 products a cycle and multiprocessor (GA100's white paper;
# GH100 reaches twice that by wgmma, and less by mma.sync: assumed).
PIPES = {
    "int": 2, "imad": 2, "fma": 1, "half": 2, "uniform": 2, "tensor": 8, "special": 8, "memory": 2, "branch": 2,
}  # fmt: skip

# Cycles from issue to the result.
LATENCY = {
    "shared": 30,  # LDS; 23 to 33 in published microbenchmarks of Ampere and Hopper
    "matrix": 33,  # LDSM; the same
    "constant": 40,  # LDC that hits; assumed
    "special": 20,  # MUFU, conversions; assumed
    "identity": 25,  # S2R; assumed
    "shuffle": 24,  # SHFL; 23 in published microbenchmarks
    "l2": 290,  # 200 to 300 in published microbenchmarks of A100 and H100
    "dram": 600,  # without load; 500 to 800 there
    "atomic": 400,  # on global memory, with its result; assumed
    "fence": 500,  # MEMBAR.SC.GPU with stores on their way; assumed
    "barrier": 20,  # from the last arrival on; assumed
    "store": 20,  # until its registers may be written; assumed
    "read": 12,  # until the sources of a memory instruction may be written; assumed
    "other": 4,
}


@dataclass(frozen=True)
class Machine:
    """One GPU. Bandwidth in bytes/s; `l2_bandwidth` is that of all multiprocessors together."""

    arch: int
    multiprocessors: int
    clock: float  # Hz
    shared_bytes: int  # that one block may ask for
    bandwidth: float  # what a copy reaches
    l2_bandwidth: float
    params_at: int  # of kernel parameters in constant bank 0
    pipes: Mapping[str, float] = field(default_factory=lambda: PIPES)
    latency: Mapping[str, int] = field(default_factory=lambda: LATENCY)
    shared_rate: int = 128  # bytes a cycle, of the shared memory of a multiprocessor
    shared_queue: int = 40  # cycles of accesses that may wait before issue stalls; assumed
    # Instruction caches. Each scheduler has an L0 of `code_l0` bytes: 12 KB on Volta, 16 KB on Turing (Jia et al.,
    # arXiv 1804.06826 and 1903.07486); assumed for later ones. The multiprocessor's next level is 128 KB on Volta (the
    # same paper); assumed. The line after the one in use is there in time: a stream buffer (Huerta et al., arXiv
    # 2503.20481).
    code_l0: int = 16 * KB
    code_l1: int = 128 * KB
    code_line: int = 128
    code_l0_miss: int = 30  # cycles, from the multiprocessor's cache; assumed
    code_l1_miss: int = 290  # from L2: as for data; assumed


# Multiprocessors, clocks (boost), shared memory: data sheets and the CUDA programming guide. Bandwidth: nine tenths of
# the data sheet, which a copy usually reaches; assumed (4.8, 3.35, 2.04, 1.01 TB/s). L2: assumed.
MACHINES = {
    "h200": Machine(90, 132, 1.98e9, 227 * KB, 4.3e12, 5.5e12, 0x210),
    "h100": Machine(90, 132, 1.98e9, 227 * KB, 3.0e12, 5.5e12, 0x210),
    # Half the float32 lanes.
    "a100": Machine(80, 108, 1.41e9, 163 * KB, 1.8e12, 4.0e12, 0x160, pipes={**PIPES, "fma": 2}),
    # 165 TFLOPS of fp16 with fp32 sums: 256 products a cycle and multiprocessor.
    "rtx4090": Machine(89, 128, 2.52e9, 99 * KB, 0.91e12, 4.0e12, 0x160, pipes={**PIPES, "tensor": 32}),
}
