"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ over csrc/sim, called through the C interface by ctypes."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from mpq_kernels.format.kinds import ZERO_KINDS
from mpq_kernels.format.weights import PackedWeight

ROOT = Path(__file__).resolve().parents[3]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
WRITABLE, UNDEFINED, INPUT, UNTRACKED = 1, 2, 4, 8
COUNTER_BYTES = 1024
OVERLAP = 1  # of mpq.h
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-DMPQ_SIM"]


class Segment(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("n0", "n1", "k0", "k1", "group_size")] + [
        ("bits", ctypes.c_int32),
        ("zero", ctypes.c_int32),
    ]


class Weight(ctypes.Structure):
    _fields_ = [
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        *((n, ctypes.c_void_p) for n in ("qweight", "scales", "zeros", "perm")),
        ("segments", ctypes.POINTER(Segment)),
        ("num_segments", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
    ]


class Device(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int32) for n in ("ordinal", "capability", "multiprocessors", "shared_bytes")]


class LinearArgs(ctypes.Structure):
    _fields_ = [
        ("weight", Weight),
        ("x", ctypes.c_void_p),
        ("x_gate", ctypes.c_void_p),
        ("x_row_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("y_row_stride", ctypes.c_int64),
        ("counters", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("x_dtype", ctypes.c_int32),
        ("bias_dtype", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
    ]


class GroupedArgs(ctypes.Structure):
    _fields_ = [("linear", LinearArgs), ("offsets", ctypes.c_void_p), ("num_experts", ctypes.c_int32)]


class DequantizeArgs(ctypes.Structure):
    _fields_ = [("weight", Weight), ("out", ctypes.c_void_p), ("out_dtype", ctypes.c_int32)]


class EmbeddingArgs(ctypes.Structure):
    _fields_ = [
        ("weight", Weight),
        ("ids", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_dtype", ctypes.c_int32),
    ]


H200 = Device(0, 90, 132, 232448)
SMALL = Device(0, 90, 5, 232448)  # few blocks, so that small weights are shared and owned
NARROW = Device(0, 89, 7, 101376)  # shared memory of a consumer card


class SimulatorError(Exception):
    """A check of the simulator failed, or the call was refused; `status` is that of mpq.h."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


def _digest(paths, *more):
    digest = hashlib.sha256(" ".join(more).encode())
    for path in [*paths, ROOT / "csrc/generated/layout.h"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _kernels():
    """Object files of the kernels and the simulator, compiled once for each state of the sources."""
    sources = sorted([*(ROOT / "csrc/cuda").iterdir(), *(ROOT / "csrc/sim").iterdir(), ROOT / "csrc/include/mpq.h"])
    build = ROOT / "build" / "simulator" / _digest(sources, *FLAGS)
    compiled = [p for p in sources if p.suffix in (".cu", ".cpp")]
    if not (build / "complete").exists():
        shutil.rmtree(build.parent, ignore_errors=True)
        build.mkdir(parents=True)
        _compile(compiled, build, [])
        (build / "complete").touch()
    return [str(build / f"{p.name}.o") for p in compiled]


def _link(name, objects, links):
    target = Path(objects[0]).parent / name
    if not target.exists():
        command = [os.environ.get("CXX", "g++"), "-shared", "-o", f"{target}.tmp", *objects, *links, "-lpthread"]
        subprocess.run(command, check=True)
        os.replace(f"{target}.tmp", target)
    return str(target)


@cache
def operators():
    """Registers mpq_simulated::linear and the others: csrc/torch/cuda_ops.cpp on tensors of the CPU."""
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
    flags += [flag for path in include_paths() for flag in ("-isystem", path)]
    links = [f"-L{path}" for path in library_paths()] + ["-ltorch", "-ltorch_cpu"]
    headers = ("counters.h", "device.h", "operands.h", "schemas.h")
    sources = [ROOT / "csrc/torch" / name for name in ("cuda_ops.cpp", *headers)]
    objects = _kernels()
    build = Path(objects[0]).parent
    name = f"operators_{_digest(sources, *flags)}"
    if not (build / f"{name}.so").exists():
        _compile(sources[:1], build, flags)
    target = _link(f"{name}.so", [*objects, str(build / "cuda_ops.cpp.o")], links)
    torch.ops.load_library(target)
    lib = ctypes.CDLL(target)
    lib.mpq_sim_error.restype = ctypes.c_char_p
    lib.mpq_sim_reset()
    # Torch's allocator gives the kernels their memory: all of it is theirs.
    lib.mpq_sim_allow(ctypes.c_void_p(4096), ctypes.c_size_t(1 << 47), WRITABLE | UNTRACKED, b"memory")
    return torch.ops.mpq_simulated


@cache
def library():
    """The kernels behind their C interface, in the simulator."""
    lib = ctypes.CDLL(_link("kernels.so", _kernels(), []))
    lib.mpq_sim_error.restype = lib.mpq_error_text.restype = lib.mpq_layout_id.restype = ctypes.c_char_p
    lib.mpq_sim_count.restype = ctypes.c_uint64
    return lib


def _compile(sources, build, flags):
    compiler = os.environ.get("CXX", "g++")
    pending = []
    for source in sources:
        to = str(build / f"{source.name}.o")
        command = [compiler, *FLAGS, *flags, f"-I{ROOT / 'csrc'}", "-x", "c++", "-c", str(source), "-o", to]
        pending.append(subprocess.Popen(command))
        if len(pending) == 2:
            assert pending.pop(0).wait() == 0, "the simulator does not compile"
    assert all([p.wait() == 0 for p in pending]), "the simulator does not compile"


def aligned(tensor):
    """A copy that begins at a multiple of 64 bytes, as device memory does."""
    if tensor is None:
        return None
    space = torch.empty(tensor.nbytes + 64, dtype=torch.uint8)
    start = -space.data_ptr() % 64
    copy = space[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def address(tensor):
    """Address of the first element, or None."""
    return None if tensor is None else tensor.data_ptr()


class Packed:
    """A packed weight where kernels can reach it."""

    def __init__(self, packed: PackedWeight):
        self.tensors = [aligned(t) for t in (packed.qweight, packed.scales, packed.zeros, packed.perm)]
        layout = packed.layout
        rows = [
            Segment(s.n0, s.n1, s.k0, s.k1, s.group_size, s.bits, ZERO_KINDS.index(s.zero)) for s in layout.segments
        ]
        self.segments = (Segment * len(rows))(*rows)
        self.shape = (layout.out_features, layout.in_features)
        self.weight = Weight(
            *self.shape, *map(address, self.tensors), self.segments, len(rows), DTYPES[packed.scales.dtype]
        )

    def allow(self, lib):
        """Register the tensors with the simulator."""
        for name, tensor in zip(("qweight", "scales", "zeros", "perm"), self.tensors, strict=True):
            if tensor is not None:
                allow(lib, tensor, 0, name)


def allow(lib, tensor, flags, name):
    """Register a tensor with the simulator."""
    lib.mpq_sim_allow(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), flags, name.encode())


def check(lib, status):
    """Raise SimulatorError unless the call succeeded and no check of the simulator failed."""
    error = lib.mpq_sim_error().decode()
    if error or status:
        raise SimulatorError(status, error or lib.mpq_error_text(status).decode())


def workspace_for(lib, size_function, args, device):
    """Poisoned memory of the size that the library asks for, or None."""
    size = ctypes.c_size_t()
    check(lib, size_function(ctypes.byref(args), ctypes.byref(device), ctypes.byref(size)))
    args = getattr(args, "linear", args)
    workspace = aligned(torch.full((size.value,), 0xFF, dtype=torch.uint8))
    if size.value:
        args.workspace, args.workspace_bytes = address(workspace), size.value
        allow(lib, workspace, WRITABLE | UNDEFINED, "workspace")
    return workspace


def linear(packed, x, bias=None, gate=None, device=SMALL, order=(0, 0), interleave=0, row_stride=None, late=None):
    """y of mpq_linear, from memory that was NaN before. x: (M, K), any row stride.

    late: the launch overlaps with the kernel ahead of it, which writes these values to x: they are there once a thread
    waits for it.
    """
    lib = library()
    lib.mpq_sim_reset()
    place = packed if isinstance(packed, Packed) else Packed(packed)
    flags = 0 if late is None else OVERLAP
    tokens, (rows, _) = x.shape[0], place.shape
    out = aligned(torch.full((tokens, row_stride or rows), float("nan"), dtype=x.dtype))
    counters = torch.zeros(COUNTER_BYTES, dtype=torch.uint8)
    args = LinearArgs(
        place.weight, address(x), address(gate), x.stride(0), tokens, address(bias), address(out), out.stride(0),
        address(counters), None, 0, DTYPES[x.dtype], DTYPES[bias.dtype] if bias is not None else 0, flags,
    )  # fmt: skip
    space = workspace_for(lib, lib.mpq_workspace_size, args, device)
    place.allow(lib)
    for name, tensor in (("x", x), ("gate", gate)):
        if tensor is not None and tensor.numel():
            span = (tensor.shape[0] - 1) * tensor.stride(0) + tensor.shape[1]
            lib.mpq_sim_allow(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(span * 2), INPUT, name.encode())
    if bias is not None:
        allow(lib, bias, 0, "bias")
    if tokens:
        allow(lib, out, WRITABLE, "y")
    allow(lib, counters, WRITABLE, "counters")
    lib.mpq_sim_order(*order)
    lib.mpq_sim_interleave(interleave)
    if late is not None:
        lib.mpq_sim_arrives_late(
            ctypes.c_void_p(address(x)), ctypes.c_void_p(address(late)), ctypes.c_size_t(late.nbytes)
        )
    check(lib, lib.mpq_linear(ctypes.byref(args), ctypes.byref(device), None))
    del space  # until here the library had its address
    assert not counters.any(), "counters are not zero after the call"
    return out[:, :rows]


def dequantize(packed, dtype, device=SMALL):
    """W [N, K] of mpq_dequantize."""
    lib = library()
    lib.mpq_sim_reset()
    place = packed if isinstance(packed, Packed) else Packed(packed)
    out = aligned(torch.full(place.shape, float("nan"), dtype=dtype))
    place.allow(lib)
    allow(lib, out, WRITABLE, "out")
    args = DequantizeArgs(place.weight, address(out), DTYPES[dtype])
    check(lib, lib.mpq_dequantize(ctypes.byref(args), ctypes.byref(device), None))
    return out


def embedding(packed, ids, dtype, device=SMALL):
    """Rows of mpq_embedding."""
    lib = library()
    lib.mpq_sim_reset()
    place = packed if isinstance(packed, Packed) else Packed(packed)
    ids = aligned(ids)
    out = aligned(torch.full((len(ids), place.shape[1]), float("nan"), dtype=dtype))
    place.allow(lib)
    allow(lib, ids, INPUT, "ids")
    allow(lib, out, WRITABLE, "out")
    args = EmbeddingArgs(place.weight, address(ids), len(ids), address(out), DTYPES[dtype])
    check(lib, lib.mpq_embedding(ctypes.byref(args), ctypes.byref(device), None))
    return out


def grouped(packed, x, offsets, num_experts, bias=None, device=SMALL, order=(0, 0)):
    """y (T, N) of mpq_grouped_linear. offsets: int32 (E + 1,)."""
    lib = library()
    lib.mpq_sim_reset()
    place = packed if isinstance(packed, Packed) else Packed(packed)
    rows = place.shape[0] // num_experts
    out = aligned(torch.full((x.shape[0], rows), float("nan"), dtype=x.dtype))
    args = LinearArgs(
        place.weight, address(x), None, x.stride(0), x.shape[0], address(bias), address(out), out.stride(0),
        None, None, 0, DTYPES[x.dtype], DTYPES[bias.dtype] if bias is not None else 0, 0,
    )  # fmt: skip
    both = GroupedArgs(args, address(offsets), num_experts)
    space = workspace_for(lib, lib.mpq_grouped_workspace_size, both, device)
    place.allow(lib)
    for name, tensor, flags in (("x", x, INPUT), ("offsets", offsets, INPUT), ("bias", bias, 0), ("y", out, WRITABLE)):
        if tensor is not None and tensor.numel():
            allow(lib, tensor, flags, name)
    lib.mpq_sim_order(*order)
    check(lib, lib.mpq_grouped_linear(ctypes.byref(both), ctypes.byref(device), None))
    del space  # until here the library had its address
    return out
