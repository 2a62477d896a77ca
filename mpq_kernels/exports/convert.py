"""`export_checkpoint`: a packed directory becomes a checkpoint of another program, with the same weights, bit for bit.

    headers, zeros -> what the target says of every linear -> sizes -> shards -> [read, unpack, write] -> rename

One weight is in memory at a time. Nothing is visible under the output's name before all of it is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..dense.checkpoint import CONFIG_FILE
from ..errors import CheckpointError
from ..files.safetensors import NewFile, Spec, file_bytes
from ..files.shards import INDEX_FILE
from ..files.strict import fsync_directory, json_bytes, write_new_file
from ..packer.carry import MODEL_CARD, NOTE, carried_bytes, folders_of
from ..packer.output import alive, check_output, check_space, swap
from ..packer.pack import MAX_SHARD_BYTES
from ..packer.parts import Made, Part, Shard, Unit, index_of, into_shards
from ..progress import Progress
from .form import Form
from .source import Linear, PackedSource
from .targets import TARGETS, check_target


@dataclass(frozen=True)
class ExportReport:
    """to: the target. linears: linear -> how it is stored. kept: names of tensors that are as they were, or in bf16.

    notes: what programs that read it may ask for. file_bytes: of the safetensors files.
    """

    to: str
    out_dir: str
    linears: dict[str, str]
    kept: tuple[str, ...]
    notes: tuple[str, ...]
    file_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def export_checkpoint(
    packed_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    to: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the packed directory `packed_dir` as the new directory `out_dir`, in the form of another program.

    to: a key of exports.targets.TARGETS. max_shard_bytes: tensor bytes of one file. progress: called as
    progress(done, total, name) with bytes of the output.

    Raises CheckpointError, before any work is done for what that form cannot hold exactly. `out_dir` must not exist.
    """
    check_target(to)
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes!r} must be a positive number of bytes")
    source = PackedSource.open(packed_dir)
    if not source.linears:
        raise CheckpointError(f"{source.path}: no linear is packed")
    form = TARGETS[to](source)
    out = _checked(out_dir, source.path)
    shards = into_shards(_units(source, form), max_shard_bytes)
    config = source.config() | dict(form.config)
    texts = {CONFIG_FILE: json_bytes(config)}
    if len(shards) > 1:
        texts = {INDEX_FILE: json_bytes(index_of(shards))} | texts
    carried, sizes = source.carried(), [file_bytes(shard.specs) for shard in shards]
    needed = sum(sizes) + sum(map(len, texts.values())) + sum(carried_bytes(source.path, carried).values())
    with _new_directory(out) as directory:
        check_space(directory, needed, len(sizes) + len(texts) + len(carried) + len(folders_of(carried)))
        _write(directory, shards, progress)
        _carry(source.path, carried, directory)
        for name, text in texts.items():  # config.json last: without it, it is no model
            write_new_file(directory / name, text)
    kept = tuple(source.checkpoint.kept_tensors())
    return ExportReport(to, str(out), dict(form.says), kept, form.notes, sum(sizes))


def _checked(out_dir: str | os.PathLike[str], packed: Path) -> Path:
    out = Path(out_dir)
    if out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out}: is not empty; choose another directory")
    return check_output(out, packed, overwrite=False)


def _units(source: PackedSource, form: Form) -> list[Unit]:
    units = []
    for linear in source.linears:
        specs = form.specs[linear.name] | source.bias_spec(linear)
        units.append(_unit(linear.name, specs, partial(_made, source, form, linear, specs)))
    for name in source.checkpoint.kept_tensors():
        stored = source.checkpoint.tensors[name]
        spec = (form.kept(stored.dtype), stored.shape)
        units.append(_unit(name, {name: spec}, partial(_kept, source, name, spec[0])))
    return units


def _unit(name: str, specs: Mapping[str, Spec], make: Callable[[], Made]) -> Unit:
    places = {tensor: (0, torch.Size(shape).numel()) for tensor, (_, shape) in specs.items()}
    part = Part(name, "", places, make, restore=lambda *_: None, digests=dict)  # nothing is taken up again
    return Unit(dict(specs), (part,))


def _made(source: PackedSource, form: Form, linear: Linear, specs: Mapping[str, Spec]) -> Made:
    tensors = form.make(linear)
    if linear.bias:
        tensors[f"{linear.name}.bias"] = source.bias(linear)
    tensors = {name: tensors[name].to(specs[name][0], copy=False) for name in specs}
    source.release(linear)
    return Made(tensors, {})


def _kept(source: PackedSource, name: str, dtype: torch.dtype) -> Made:
    return Made({name: source.checkpoint.read(name).to(dtype)}, {})


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """Yields where to write; it becomes `out` when the block ends well, and is removed otherwise.

    What killed runs left is removed first. OSError becomes CheckpointError.
    """
    lead = f".{out.name}.exported-"
    try:
        for name in os.listdir(out.parent):
            pid = name.removeprefix(lead)
            if name.startswith(lead) and pid.isdecimal() and int(pid) != os.getpid() and not alive(int(pid)):
                shutil.rmtree(out.parent / name)
        directory = out.with_name(f"{lead}{os.getpid()}")
        directory.mkdir()
        try:
            yield directory
            fsync_directory(directory)
            swap(directory, out)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    except OSError as error:
        raise CheckpointError(f"{error.filename or out}: cannot write {out} ({error.strerror or error})") from error


def _write(directory: Path, shards: list[Shard], progress: Progress | None) -> None:
    total, done = sum(file_bytes(shard.specs) for shard in shards), 0
    for shard in shards:
        with NewFile.create(directory / shard.name, shard.specs) as file:
            for part in shard.parts:
                tensors = part.make().tensors
                for name, tensor in tensors.items():
                    file.write(name, 0, tensor)
                    done += tensor.nbytes
                if progress is not None:
                    progress(done, total, part.name)
            file.sync()


def _carry(root: Path, names: list[str], directory: Path) -> None:
    """Copy the other files; a model card without the note that packing wrote."""
    for folder in folders_of(names):
        (directory / folder).mkdir()
    for name in names:
        text = (root / name).read_bytes()
        write_new_file(directory / name, text.replace(NOTE, b"") if name.lower() == MODEL_CARD else text)
