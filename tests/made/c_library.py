"""libmpq_cpu through ctypes: the structures of csrc/include, and its functions with torch tensors as memory."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p

import torch

from mpq_kernels import capi
from mpq_kernels.format.codes import SCALE_DTYPES
from mpq_kernels.format.kinds import ZERO_KINDS
from mpq_kernels.format.weights import TORCH_DTYPES

VERSION = 1
DTYPES = {TORCH_DTYPES[name]: number for number, name in enumerate(SCALE_DTYPES)}


class Segment(Structure):
    _fields_ = [(name, c_int64) for name in ("n0", "n1", "k0", "k1", "group_size")] + [
        ("bits", c_int32),
        ("zero", c_int32),
    ]


class Weight(Structure):
    _fields_ = [
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("qweight", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("perm", c_void_p),
        ("segments", POINTER(Segment)),
        ("num_segments", c_int32),
        ("scale_dtype", c_int32),
    ]


class Linear(Structure):
    _fields_ = [
        ("weight", Weight),
        ("x", c_void_p),
        ("x_gate", c_void_p),
        ("x_row_stride", c_int64),
        ("tokens", c_int64),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("y_row_stride", c_int64),
        ("counters", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
        ("x_dtype", c_int32),
        ("bias_dtype", c_int32),
        ("flags", c_uint32),
    ]


class Grouped(Structure):
    _fields_ = [("linear", Linear), ("offsets", c_void_p), ("num_experts", c_int32)]


class Dequantize(Structure):
    _fields_ = [("weight", Weight), ("out", c_void_p), ("out_dtype", c_int32)]


class Embedding(Structure):
    _fields_ = [
        ("weight", Weight),
        ("ids", c_void_p),
        ("count", c_int64),
        ("out", c_void_p),
        ("out_dtype", c_int32),
    ]


class Cpu(Structure):
    _fields_ = [("isa", c_int32), ("activations", c_int32), ("run", c_void_p), ("pool", c_void_p)]


class Member(Structure):
    _fields_ = [("name", c_char_p), ("n0", c_int64), ("n1", c_int64)]


class Module(Structure):
    _fields_ = [
        ("name", c_char_p),
        ("weight", Weight),
        ("bias", c_void_p),
        ("bias_dtype", c_int32),
        ("num_experts", c_int32),
        ("embedding", c_int32),
        ("num_members", c_int32),
        ("members", POINTER(Member)),
        *((f"{name}_bytes", c_size_t) for name in ("qweight", "scales", "zeros", "perm", "bias")),
    ]


class Tensor(Structure):
    _fields_ = [
        ("dtype", c_char_p),
        ("shape", POINTER(c_int64)),
        ("rank", c_int32),
        ("data", c_void_p),
        ("bytes", c_size_t),
    ]


def load() -> ctypes.CDLL:
    """The library, with the types of what is not an int of pointers."""
    library = ctypes.CDLL(str(capi.library()))
    library.mpq_cpu_layout_id.restype = library.mpq_cpu_error_text.restype = c_char_p
    library.mpq_cpu_isa_name.restype = c_char_p
    library.mpq_cpu_query.argtypes = [c_uint32, c_char_p, POINTER(Cpu)]
    library.mpq_cpu_pool_open.argtypes = [c_int32, POINTER(c_void_p)]
    library.mpq_cpu_pool_close.argtypes = [c_void_p]
    library.mpq_model_open.argtypes = [c_uint32, c_char_p, POINTER(c_void_p), c_char_p, c_size_t]
    library.mpq_model_close.argtypes = [c_void_p]
    library.mpq_model_count.argtypes, library.mpq_model_count.restype = [c_void_p], c_int64
    library.mpq_model_module.argtypes = [c_void_p, c_int64]
    library.mpq_model_find.argtypes = [c_void_p, c_char_p]
    library.mpq_model_module.restype = library.mpq_model_find.restype = POINTER(Module)
    library.mpq_model_tensor.argtypes = [c_void_p, c_char_p, POINTER(Tensor)]
    for name in ("workspace_size", "grouped_workspace_size"):
        getattr(library, f"mpq_cpu_{name}").argtypes = [c_void_p, POINTER(Cpu), POINTER(c_size_t)]
    for name in ("linear", "grouped_linear", "dequantize", "embedding"):
        getattr(library, f"mpq_cpu_{name}").argtypes = [c_void_p, POINTER(Cpu)]
        getattr(library, f"mpq_cpu_{name}").restype = c_int
    return library


LIBRARY = load()


class CError(Exception):
    """A status that is not MPQ_OK, and its text."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}: {LIBRARY.mpq_cpu_error_text(status).decode()}")
        self.status = status


def check(status: int) -> None:
    if status:
        raise CError(status)


def query(isa: str | None = None, int8: bool = False, version: int = VERSION) -> Cpu:
    """mpq_cpu_query, and the kind of activations."""
    cpu = Cpu()
    check(LIBRARY.mpq_cpu_query(version, isa.encode() if isa else None, byref(cpu)))
    cpu.activations = int(int8)
    return cpu


class Pool:
    """Threads of the library for a Cpu."""

    def __init__(self, threads: int) -> None:
        self.handle = c_void_p()
        check(LIBRARY.mpq_cpu_pool_open(threads, byref(self.handle)))

    def give(self, cpu: Cpu) -> Cpu:
        cpu.run = ctypes.cast(LIBRARY.mpq_cpu_pool_run, c_void_p)
        cpu.pool = self.handle
        return cpu

    def close(self) -> None:
        LIBRARY.mpq_cpu_pool_close(self.handle)


def weight_of(packed) -> Weight:
    """mpq_weight of a PackedWeight, which must be kept for as long."""
    layout = packed.layout
    segments = (Segment * len(layout.segments))(
        *((s.n0, s.n1, s.k0, s.k1, s.group_size, s.bits, ZERO_KINDS.index(s.zero)) for s in layout.segments)
    )
    address = {name: getattr(packed, name) for name in ("qweight", "scales", "zeros", "perm")}
    pointers = {name: None if tensor is None else tensor.data_ptr() for name, tensor in address.items()}
    return Weight(
        out_features=layout.out_features,
        in_features=layout.in_features,
        segments=segments,
        num_segments=len(segments),
        scale_dtype=DTYPES[packed.scales.dtype],
        **pointers,
    )


def linear_args(x, packed, columns, bias=None) -> tuple[Linear, torch.Tensor]:
    """(arguments without a workspace, y that they write). x: (M, K), columns contiguous."""
    y = torch.full((len(x), columns), float("nan"), dtype=x.dtype)
    args = Linear(weight=weight_of(packed), x=x.data_ptr(), x_row_stride=x.stride(0), tokens=len(x), y=y.data_ptr())
    args.y_row_stride, args.x_dtype = columns, DTYPES[x.dtype]
    if bias is not None:
        args.bias, args.bias_dtype = bias.data_ptr(), DTYPES[bias.dtype]
    return args, y


def give_workspace(args: Linear, size: int) -> torch.Tensor:
    """A workspace of exactly so many bytes, filled with ones; kept by the caller."""
    memory = torch.full((size + 1,), 255, dtype=torch.uint8)
    args.workspace, args.workspace_bytes = memory.data_ptr(), size
    return memory


def linear(x, packed, cpu: Cpu, bias=None) -> torch.Tensor:
    """mpq_cpu_linear. Raises CError."""
    args, y = linear_args(x, packed, packed.layout.out_features, bias)
    size = c_size_t()
    check(LIBRARY.mpq_cpu_workspace_size(byref(args), byref(cpu), byref(size)))
    memory = give_workspace(args, size.value)
    check(LIBRARY.mpq_cpu_linear(byref(args), byref(cpu)))
    assert memory[size.value] == 255, "the workspace was overrun"
    return y


def grouped_linear(x, packed, offsets, cpu: Cpu, bias=None) -> torch.Tensor:
    """mpq_cpu_grouped_linear. Raises CError."""
    experts = len(offsets) - 1
    args, y = linear_args(x, packed, packed.layout.out_features // experts, bias)
    grouped = Grouped(linear=args, offsets=offsets.data_ptr(), num_experts=experts)
    size = c_size_t()
    check(LIBRARY.mpq_cpu_grouped_workspace_size(byref(grouped), byref(cpu), byref(size)))
    memory = give_workspace(grouped.linear, size.value)
    check(LIBRARY.mpq_cpu_grouped_linear(byref(grouped), byref(cpu)))
    assert memory[size.value] == 255, "the workspace was overrun"
    return y


def dequantize(packed, dtype, cpu: Cpu) -> torch.Tensor:
    """mpq_cpu_dequantize. Raises CError."""
    out = torch.full((packed.layout.out_features, packed.layout.in_features), float("nan"), dtype=dtype)
    check(LIBRARY.mpq_cpu_dequantize(byref(Dequantize(weight_of(packed), out.data_ptr(), DTYPES[dtype])), byref(cpu)))
    return out


def embedding(ids, packed, dtype, cpu: Cpu) -> torch.Tensor:
    """mpq_cpu_embedding. Raises CError."""
    out = torch.full((len(ids), packed.layout.in_features), float("nan"), dtype=dtype)
    args = Embedding(weight_of(packed), ids.data_ptr(), len(ids), out.data_ptr(), DTYPES[dtype])
    check(LIBRARY.mpq_cpu_embedding(byref(args), byref(cpu)))
    return out
