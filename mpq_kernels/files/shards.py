"""The tensors of a checkpoint directory: one safetensors file, or several and an index.

    model.safetensors                                        as transformers, this one wins when both are there
    model.safetensors.index.json {"weight_map": {tensor: file}} -> model-00001-of-00002.safetensors, ...

Every header is checked before any tensor is read; tensors are then mapped, not copied.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import CheckpointError
from .safetensors import DTYPES, TensorEntry, read_header
from .strict import contained_file, read_json_object, short

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What other programs call their weights; none of these is read, and pickles can run code.
FOREIGN_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the file that holds it."""

    name: str
    file: Path
    entry: TensorEntry

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it is read from."""
        return (self.file,)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype as torch knows it."""
        return DTYPES[self.entry.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""
        return self.entry.shape

    def __str__(self) -> str:
        return f"{self.file}: tensor {short(self.name)} ({self.entry})"


@dataclass(frozen=True, eq=False)
class TensorFiles:
    """All tensors of some safetensors files; files are mapped when first read and stay mapped."""

    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, files: Sequence[str | os.PathLike[str]]) -> TensorFiles:
        """Check the header of every file. Raises CheckpointError, also for a tensor that two files hold."""
        paths = tuple(map(Path, files))
        tensors: dict[str, StoredTensor] = {}
        for path in paths:
            for name, entry in read_header(path).tensors.items():
                if name in tensors:
                    raise CheckpointError(f"{path}: tensor {short(name)} is also in {tensors[name].file}; keep one")
                tensors[name] = StoredTensor(name, path, entry)
        return cls(tensors, paths)

    @classmethod
    def open_directory(cls, directory: Path) -> TensorFiles:
        """Find the files of a checkpoint directory, check the index against them, and open them.

        Raises CheckpointError: no safetensors file, a pickle instead of one, an index that names files elsewhere or
        tensors that its files do not hold.
        """
        if os.path.lexists(directory / SINGLE_FILE):
            return cls.open([contained_file(directory, SINGLE_FILE)])
        if not os.path.lexists(directory / INDEX_FILE):
            raise CheckpointError(_no_weights(directory))
        index = contained_file(directory, INDEX_FILE)
        placed = read_json_object(index).get("weight_map")
        if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
            raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
        names = sorted(set(placed.values()))
        for name in names:
            if not name.endswith(".safetensors"):
                raise CheckpointError(f"{index}: {short(name)} is not a .safetensors file; only those are read")
        opened = cls.open([contained_file(directory, name) for name in names])
        for name, file_name in placed.items():
            found = opened.tensors.get(name)
            if found is None or found.file.name != file_name:
                where = "no file" if found is None else found.file.name
                raise CheckpointError(
                    f"{index}: tensor {short(name)} should be in {file_name}, and {where} holds it; download both again"
                )
        return opened

    def read(self, name: str) -> torch.Tensor:
        """A tensor on the CPU, mapped without a copy (writing to it does not reach the file).

        Raises CheckpointError when there is no such tensor or its file has changed since it was checked.
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{self.files[0].parent}: there is no tensor {short(name)}")
        if stored.file not in self._maps:
            self._maps[stored.file] = self._map(stored)
        entry = stored.entry
        self._check_size(stored)
        if not entry.nbytes:
            return torch.empty(stored.shape, dtype=stored.dtype)
        raw = torch.frombuffer(self._maps[stored.file], dtype=torch.uint8, count=entry.nbytes, offset=entry.start)
        if entry.start % stored.dtype.itemsize:
            raw = raw.clone()  # files of other tools may begin a tensor anywhere
        return raw.view(stored.dtype).view(stored.shape)

    def _check_size(self, stored: StoredTensor) -> None:
        """Raise CheckpointError when a mapped file is not as long as it was: to read behind its end ends the process.

        A file may still be cut short later; nothing but a copy would be safe from that.
        """
        try:
            size = os.stat(stored.file).st_size
        except OSError:
            return  # removed, or replaced: what is mapped stays
        if size < stored.entry.end:
            raise CheckpointError(f"{stored}: its file was cut to {size} bytes while it was used")

    def release(self, name: str) -> None:
        """Give back the memory that a tensor took when its mapped bytes were read. It can still be read, from the file.

        Nothing may have been written to the tensor.
        """
        stored = self.tensors[name]
        mapped = self._maps.get(stored.file)
        if mapped is not None and stored.entry.nbytes:
            start = stored.entry.start - stored.entry.start % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, start, stored.entry.end - start)

    def _entries(self, file: Path) -> Mapping[str, TensorEntry]:
        """The tensors of a file as they are now."""
        return read_header(file).tensors

    def _map(self, stored: StoredTensor) -> mmap.mmap:
        """The whole file of a tensor, mapped; private, so that a write to a tensor does not reach it."""
        now = self._entries(stored.file)
        for tensor in self.tensors.values():
            if tensor.file == stored.file and now.get(tensor.name) != tensor.entry:
                found = now.get(tensor.name, "no tensor at all")
                raise CheckpointError(f"{tensor}: now reads as {found}; the file has changed")
        try:
            with open(stored.file, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{stored}: cannot be mapped ({error})") from error


def _no_weights(directory: Path) -> str:
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        return f"{directory}: cannot be listed ({error.strerror or error})"
    foreign = [name for name in names if name.endswith(FOREIGN_SUFFIXES)]
    if foreign:
        return (
            f"{directory}: holds {short(foreign[0])} and no {SINGLE_FILE}; pickles can run code and are never read. "
            "Load it where you trust it and save_pretrained() it as safetensors"
        )
    return f"{directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; this is not a Hugging Face checkpoint"
