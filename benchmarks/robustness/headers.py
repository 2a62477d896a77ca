"""safetensors files, mutated: their headers, and the bytes of the whole file; and what an index says of files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random

import safetensors
import torch

from mpq_kernels.errors import CheckpointError
from mpq_kernels.files.shards import INDEX_FILE, TensorFiles
from mpq_kernels.files.strict import read_json_object

from .campaign import Run
from .mutate import mutate_bytes, mutate_json
from .world import make_packed

KNOWN = ("dtype", "shape", "data_offsets", "__metadata__", "F16", "F32", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64")
TENSORS = {
    "a.qweight": torch.arange(64, dtype=torch.int32), "a.scales": torch.ones(16, dtype=torch.float16),
    "a.zeros": torch.zeros(16, dtype=torch.uint8), "b": torch.ones(3, 5), "empty": torch.ones(0, 7),
    "scalar": torch.tensor(1.5), "wide": torch.ones(2, 3, 2, 2, dtype=torch.bfloat16),
}  # fmt: skip


def mutate_file(chance: Random, data: bytes) -> bytes:
    """The bytes of a file with a changed header, a header of another length, or any bytes changed."""
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.75:
        header = mutate_json(chance, json.loads(data[8 : 8 + length]), KNOWN)
        data = len(header).to_bytes(8, "little") + header + data[8 + length :]
        if chance.random() < 0.9:
            return data
    if chance.random() < 0.3:
        wrong = chance.choice((0, 1, 7, length - 1, length + 1, len(data), 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1))
        return wrong.to_bytes(8, "little") + data[8:]
    return mutate_bytes(chance, data)


def prepare(folder: Path) -> Run:
    """Cases: one file opened and every tensor read. What is accepted must be what the safetensors library reads."""
    from safetensors.torch import save

    whole = save(TENSORS, metadata={"format": "pt"})

    def run(chance: Random) -> str:
        path = Path("model.safetensors")
        path.write_bytes(mutate_file(chance, whole))
        files = TensorFiles.open([path])
        read = {name: files.read(name) for name in files.tensors}
        with safetensors.safe_open(path, "pt") as theirs:
            assert set(theirs.keys()) == set(read)
            for name, tensor in read.items():
                other = theirs.get_tensor(name)
                assert other.dtype == tensor.dtype and other.shape == tensor.shape
                assert bytes(other.reshape(-1).view(torch.uint8)) == bytes(tensor.reshape(-1).view(torch.uint8))
        return "read"

    return run


NAMES = ("../out.safetensors", "/etc/passwd", "link.safetensors", "loop.safetensors", "fifo.safetensors",
         "folder.safetensors", "inside.safetensors", "none.safetensors", "a/b.safetensors", "model.bin", "weight_map",
         "model-00001-of-00002.safetensors", "x" * 300 + ".safetensors", "..", "MODEL-00001-OF-00002.SAFETENSORS",
         "model.safetensors.index.json", "metadata", "\ud800.safetensors", "nul\0.safetensors")  # fmt: skip


def prepare_index(folder: Path) -> Run:
    """Cases: a directory of shards opened by a changed index; a file outside of it must never be read."""
    packed = make_packed(folder, shard_bytes=30_000)
    index = read_json_object(packed / INDEX_FILE)
    home = folder / "index"
    shutil.copytree(packed, home)
    shutil.copy(next(home.glob("*.safetensors")), folder / "out.safetensors")
    (home / "link.safetensors").symlink_to(folder / "out.safetensors")
    (home / "loop.safetensors").symlink_to("loop.safetensors")
    (home / "inside.safetensors").symlink_to(sorted(home.glob("model-*"))[0].name)
    (home / "folder.safetensors").mkdir()
    os.mkfifo(home / "fifo.safetensors")
    allowed = {path.resolve() for path in home.glob("model-*")}

    def run(chance: Random) -> str:
        path = Path("index") / INDEX_FILE
        if not path.parent.exists():  # each process has a directory of its own
            shutil.copytree(home, path.parent, symlinks=True, ignore=shutil.ignore_patterns("fifo*"))
            os.mkfifo(path.parent / "fifo.safetensors")
        path.write_bytes(mutate_json(chance, index, NAMES + tuple(index["weight_map"])[:5]))
        try:
            files = TensorFiles.open_directory(path.parent)
        except CheckpointError:
            raise
        inside = path.parent.resolve()
        assert all(file.resolve().parent == inside for file in files.files)
        assert len(allowed) and set(json.loads(path.read_bytes())["weight_map"]) <= set(files.tensors)
        return "opened"

    return run
