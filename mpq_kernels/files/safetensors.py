"""safetensors files: a strict header reader, and a writer whose bytes depend on nothing but the tensors.

    | u64 n | n bytes of JSON, padded with spaces | tensor data, no gaps |
                                                  ^ a multiple of 64 from the start of the file

Why not the library's own writer: it holds every tensor at once, does not fsync, makes files that only the owner can
read, and aligns the data to 8 bytes. Why not its reader for headers: it accepts repeated keys and any tensor name.
Source of the format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .strict import MAX_JSON_BYTES, parse_json, short, write_all

ALIGNMENT = 64  # bytes: one cache line, the widest CPU vector
MAX_RANK = 32
MAX_ELEMENTS = 2**59  # of 16 bytes each fit 63 bits

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. dtype: its name in DTYPES. start, end: bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Header:
    """Checked header: the tensors in the order of their data, and the string metadata."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def nbytes(spec: Spec) -> int:
    """Bytes of a tensor of this dtype and shape."""
    return math.prod(spec[1]) * spec[0].itemsize


def read_header(path: str | os.PathLike[str]) -> Header:
    """Header of a safetensors file, checked against the file's size. Reads no tensor data.

    Raises CheckpointError naming the file, the tensor and the cause: not a regular file, truncated or longer than its
    header says, header over 100 MB, malformed JSON, a repeated or unprintable name, an unknown dtype, a shape that does
    not match its bytes, data that overlap or leave gaps.
    """
    path = Path(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(8), size)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(raw) != length:
        raise CheckpointError(f"{path}: shrank while it was read")
    data = parse_json(raw, str(path)) if raw[:1] == b"{" else None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object; this is not a safetensors file")
    metadata = data.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    entries = {name: _entry(path, name, value, 8 + length, size) for name, value in data.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_tiling(path, ordered, 8 + length, size)
    return Header(ordered, metadata)


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: truncated: {size} bytes, fewer than the 8 of a safetensors length field")
    length = int.from_bytes(prefix, "little")
    if length > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path}: the header claims {length} bytes, more than the limit of {MAX_JSON_BYTES}; "
            "this is not a safetensors file"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: truncated: the header claims {length} bytes and the file has {size}; download it again"
        )
    return length


def _entry(path: Path, name: str, value: Any, data_start: int, size: int) -> TensorEntry:
    where = f"{path}: tensor {short(name)}"
    if not name or not name.isprintable():
        raise CheckpointError(f"{where}: a name must be printable and not empty")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected the keys dtype, shape and data_offsets, found {short(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype {short(dtype)} is not one of {sorted(DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_RANK:
        raise CheckpointError(f"{where}: shape {short(shape)} is not a list of at most {MAX_RANK} sizes")
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:  # also of an empty tensor, which torch could not make
        raise CheckpointError(f"{where}: shape {short(shape)} has sizes out of range")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {short(offsets)} are not [begin, end]")
    begin, end = offsets
    if data_start + end > size:
        raise CheckpointError(
            f"{where}: its data end at byte {data_start + end} and the file has {size}: truncated; download it again"
        )
    needed = nbytes((DTYPES[dtype], tuple(shape)))
    if needed != end - begin:
        raise CheckpointError(
            f"{where}: {dtype} {short(shape)} takes {short(needed)} bytes, data_offsets give {end - begin}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + begin, data_start + end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_tiling(path: Path, ordered: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    at = data_start
    for name, entry in ordered.items():
        if entry.start != at:
            how = "overlaps the one before" if entry.start < at else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {short(name)}: its data begin at {entry.start}, not {at}: it {how}")
        at = entry.end
    if at != size:
        raise CheckpointError(f"{path}: {size - at} bytes after the last tensor belong to none; the file is damaged")


def storage_order(specs: Mapping[str, Spec]) -> list[str]:
    """Names in the order in which they are stored.

    Tensors whose bytes are a multiple of 64 come first, then of 32, 16, ...: since the format allows no gaps, each then
    starts at a multiple of the largest power of two (up to 64) in its own bytes. The order is otherwise kept.
    """
    return sorted(specs, key=lambda name: -math.gcd(nbytes(specs[name]), ALIGNMENT))


def encode_header(specs: Mapping[str, Spec]) -> bytes:
    """Length field and padded JSON header of a file that holds `specs` in storage order."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in storage_order(specs):
        dtype, shape = specs[name]
        if dtype not in NAMES:
            raise CheckpointError(f"tensor {short(name)}: safetensors has no dtype for {dtype}")
        end = at + nbytes(specs[name])
        fields[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"a header of {len(text)} bytes is over the limit of {MAX_JSON_BYTES}: use more shards")
    return len(text).to_bytes(8, "little") + text


def file_bytes(specs: Mapping[str, Spec]) -> int:
    """Exact size in bytes of the file that NewFile makes."""
    return len(encode_header(specs)) + sum(map(nbytes, specs.values()))


class NewFile:
    """A safetensors file in the making: its header is on disk first, then tensors or parts of them in any order.

    What has not been written yet reads as zeros. Use as a context manager, or call `close`.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], descriptor: int) -> None:
        """`create` and `reopen` make one."""
        self.path, self.specs, self._descriptor = path, dict(specs), descriptor
        self._starts: dict[str, int] = {}
        at = len(encode_header(specs))
        for name in storage_order(specs):
            self._starts[name] = at
            at += nbytes(specs[name])

    @classmethod
    def create(cls, path: Path, specs: Mapping[str, Spec]) -> NewFile:
        """A file that must not exist yet, of its final size. Mode 0666 & ~umask. Raises OSError."""
        header = encode_header(specs)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        file = cls(path, specs, os.open(path, flags, 0o666))
        try:
            write_all(file._descriptor, header)
            os.ftruncate(file._descriptor, file_bytes(specs))
            file.sync()
        except BaseException:
            file.close()
            raise
        return file

    @classmethod
    def reopen(cls, path: Path, specs: Mapping[str, Spec]) -> NewFile:
        """Go on with a file that `create` made. Raises CheckpointError unless it has this header and size; OSError."""
        header = encode_header(specs)
        file = cls(path, specs, os.open(path, os.O_RDWR | os.O_CLOEXEC))
        found, size = os.pread(file._descriptor, len(header), 0), os.fstat(file._descriptor).st_size
        if found != header or size != file_bytes(specs):
            file.close()
            raise CheckpointError(f"{path}: {size} bytes that are not those of the tensors to be packed")
        return file

    def write(self, name: str, start: int, tensor: torch.Tensor) -> None:
        """Put the elements of `tensor` behind the first `start` elements of the tensor `name`.

        Raises CheckpointError when they are of another dtype, or more than there is room for; OSError.
        """
        dtype, shape = self.specs[name]
        if tensor.dtype != dtype or not 0 <= start <= math.prod(shape) - tensor.numel():
            raise CheckpointError(
                f"{self.path}: tensor {short(name)}: {tensor.dtype} {list(tensor.shape)} does not fit behind {start} "
                f"elements of {dtype} {list(shape)}"
            )
        view, at = tensor_bytes(tensor), self._starts[name] + start * dtype.itemsize
        while view:
            count = os.pwrite(self._descriptor, view, at)
            view, at = view[count:], at + count

    def read(self, name: str, start: int, count: int) -> torch.Tensor:
        """`count` elements behind the first `start` of the tensor `name`, as written: one-dimensional, a copy."""
        dtype = self.specs[name][0]
        data, left = bytearray(), count * dtype.itemsize
        while left:
            piece = os.pread(self._descriptor, left, self._starts[name] + start * dtype.itemsize + len(data))
            if not piece:
                raise CheckpointError(f"{self.path}: ends inside the tensor {short(name)}")
            data += piece
            left -= len(piece)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)

    def sync(self) -> None:
        """Return when all that was written is on disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; does not sync."""
        os.close(self._descriptor)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Raw little-endian bytes of a tensor; no copy when it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
