"""A packed checkpoint: config.json with a quantization_config, and safetensors files that are used as they are.

    "<module>.qweight" int32, ".scales", ".zeros", ".perm", ".bias"      tensors of the packed modules
    "<dense module>.weight" [0]                                          a guard, see `guards`
    anything else                                                        kept as in the dense checkpoint

Everything is checked against the headers before any tensor is allocated or mapped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..dense.checkpoint import CONFIG_FILE, check_layer_count
from ..errors import CheckpointError, FormatError
from ..files.shards import StoredTensor, TensorFiles
from ..files.strict import contained_file, read_json_object, short
from ..format.float8 import bad_float8
from ..format.layout import Member, SizeBreakdown
from ..format.weights import TORCH_DTYPES, PackedWeight
from .config import Float8Module, PackedModule, PackingConfig

__all__ = ["CheckpointSize", "Member", "PackedCheckpoint", "PackedModule", "PackingConfig", "validate_tensors"]

GUARD_SHAPE = (0,)
BIAS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of a packed checkpoint. packed: its packed weights by purpose, those in float8 too. bias, kept: bytes of
    those tensors.

    files: bytes of the safetensors files, headers included.
    """

    packed: SizeBreakdown
    bias: int
    kept: int
    files: int


@dataclass(frozen=True, eq=False)
class PackedCheckpoint:
    """An opened packed checkpoint.

    path: its directory, or that of its files. config: config.json. packing: the checked quantization_config.
    """

    path: Path
    config: dict[str, Any]
    packing: PackingConfig
    files: TensorFiles

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> PackedCheckpoint:
        """Check config.json, the index and every header of a directory that may come from anybody.

        Raises CheckpointError naming file and tensor: not a packed checkpoint, an unknown version or layout, a tensor
        missing, misshapen, of a wrong dtype or without a module, truncated files, names that lead elsewhere.
        """
        path = Path(directory)
        if not path.is_dir():
            raise CheckpointError(f"{path}: is not a directory; give one that mpq pack wrote")
        config = read_json_object(contained_file(path, CONFIG_FILE))
        where = path / CONFIG_FILE
        if "quantization_config" not in config:
            raise CheckpointError(f"{where}: has no quantization_config; this is a dense model, pack it first")
        packing = PackingConfig.from_dict(config["quantization_config"], f"{where}: quantization_config")
        files = TensorFiles.open_directory(path)
        check_layer_count(where, config, len(files.tensors))
        check_tensors(packing.modules, files, packing.floats)
        return cls(path, config, packing, files)

    @classmethod
    def from_config(
        cls, quantization_config: Mapping[str, Any], files: Sequence[str | os.PathLike[str]]
    ) -> PackedCheckpoint:
        """The same from a quantization_config and files that were found elsewhere (a hub cache). Same checks."""
        packing = PackingConfig.from_dict(quantization_config)
        opened = validate_tensors(packing.modules, files, packing.floats)
        parent = opened.files[0].parent
        return cls(parent, {"quantization_config": dict(quantization_config)}, packing, opened)

    @property
    def modules(self) -> dict[str, PackedModule]:
        """Packed modules by name, in model order."""
        return self.packing.modules

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every stored tensor by name."""
        return self.files.tensors

    def weight(self, name: str) -> PackedWeight:
        """The packed weight of a module; its tensors are mapped from the file, on the CPU, without a copy."""
        module = self._module(name)
        tensors = {key: self.files.read(f"{name}.{key}") for key in module.layout.tensor_specs()}
        return PackedWeight(module.layout, **tensors)

    def bias(self, name: str) -> torch.Tensor | None:
        """The bias [N] of a module, None when it has none."""
        return self.files.read(f"{name}.bias") if self._module(name).bias else None

    def read(self, name: str) -> torch.Tensor:
        """Any stored tensor, mapped without a copy."""
        return self.files.read(name)

    def release(self, name: str) -> None:
        """Give back the memory that reading a module took; it can still be read, from the files."""
        for tensor in self._module(name).tensor_names:
            self.files.release(tensor)

    def kept_tensors(self) -> list[str]:
        """Names of the tensors that belong to no packed module, sorted."""
        packed = {name for module in self.modules.values() for name in module.tensor_names}
        packed.update(*(module.tensor_names for module in self.packing.floats.values()))
        return sorted(set(self.tensors) - packed - set(guards(self.modules, self.files)))

    def size(self) -> CheckpointSize:
        """Bytes by purpose, recomputed from the stored tensors. Raises CheckpointError when they do not add up."""
        packed, bias, held = SizeBreakdown(), 0, 0
        for module in self.modules.values():
            packed += module.layout.size()
            held += sum(self.tensors[name].entry.nbytes for name in module.tensor_names)
            bias += self.tensors[f"{module.name}.bias"].entry.nbytes if module.bias else 0
        for float8 in self.packing.floats.values():
            packed += float8.shape.size()
            held += sum(self.tensors[name].entry.nbytes for name in float8.tensor_names)
            bias += self.tensors[f"{float8.name}.bias"].entry.nbytes if float8.bias else 0
        if held - bias != packed.total_bytes:
            raise CheckpointError(f"{self.path}: packed tensors hold {held - bias} bytes, layouts {packed.total_bytes}")
        kept = sum(self.tensors[name].entry.nbytes for name in self.kept_tensors())
        return CheckpointSize(packed, bias, kept, sum(file.stat().st_size for file in self.files.files))

    def verify_values(self) -> None:
        """Read every packed tensor and raise CheckpointError for values that no packer writes (NaN, a broken perm)."""
        for _ in self.verified():
            pass

    def verified(self) -> Iterator[str]:
        """The same, module by module: yields each name when its values have been found good."""
        for name, module in self.modules.items():
            try:
                self.weight(name).check_values()
            except FormatError as error:
                file = self.tensors[f"{name}.qweight"].file
                raise CheckpointError(f"{file}: module {short(name)}: {error}; pack the model again") from error
            bias = self.bias(name)
            if bias is not None and not bool(torch.isfinite(bias).all()):
                raise CheckpointError(f"{self.tensors[f'{module.name}.bias']}: holds NaN or Inf")
            self.release(name)
            yield name
        for name, float8 in self.packing.floats.items():
            reason = bad_float8(self.read(f"{name}.qweight"), self.read(f"{name}.scales"))
            if reason is not None:
                raise CheckpointError(f"{self.tensors[f'{name}.qweight']}: {reason}; pack the model again")
            for tensor in float8.tensor_names:
                self.files.release(tensor)
            yield name

    def _module(self, name: str) -> PackedModule:
        if name not in self.modules:
            raise CheckpointError(f"{self.path}: {short(name)} is not a packed module of this checkpoint")
        return self.modules[name]


def validate_tensors(
    modules: Mapping[str, PackedModule],
    files: Sequence[str | os.PathLike[str]],
    floats: Mapping[str, Float8Module] | None = None,
) -> TensorFiles:
    """Open safetensors files and check that they hold exactly the tensors of `modules` and `floats`, besides kept ones.

    Raises CheckpointError naming file and tensor. Reads headers only.
    """
    if not files:
        raise CheckpointError("a packed checkpoint needs at least one safetensors file; none was given")
    opened = TensorFiles.open(files)
    check_tensors(modules, opened, floats)
    return opened


def check_tensors(
    modules: Mapping[str, PackedModule], files: TensorFiles, floats: Mapping[str, Float8Module] | None = None
) -> None:
    """Raise CheckpointError unless each packed module has its tensors, of its dtypes and shapes, and no others."""
    where = files.files[0].parent
    specs: dict[int, dict[str, tuple[str, tuple[int, ...]]]] = {}  # by identity: modules share layout objects
    expected: set[str] = set()
    for name, module in modules.items():
        layout_specs = specs.setdefault(id(module.layout), {}) or module.layout.tensor_specs()
        specs[id(module.layout)] = layout_specs
        for key, (dtype, shape) in layout_specs.items():
            _check_tensor(files.tensors, where, f"{name}.{key}", (TORCH_DTYPES[dtype],), shape)
            expected.add(f"{name}.{key}")
        if module.bias:
            _check_tensor(files.tensors, where, f"{name}.bias", BIAS_DTYPES, (module.layout.out_features,))
            expected.add(f"{name}.bias")
    for name, float8 in (floats or {}).items():
        for key, (kind, shape) in float8.shape.tensor_specs().items():
            _check_tensor(files.tensors, where, f"{name}.{key}", (kind,), shape)
        if float8.bias:
            _check_tensor(files.tensors, where, f"{name}.bias", BIAS_DTYPES, (float8.shape.out_features,))
        expected.update(float8.tensor_names)
    owned = set(modules).union(floats or (), *(module.replaced() for module in modules.values() if module.members))
    shared = {name for module in modules.values() for name in module.shared}
    expected.update(guards(modules, files))
    for name, tensor in files.tensors.items():
        owner, _, last = name.rpartition(".")
        if name not in expected and (owner in owned or last == "qweight" or (owner in shared and last == "weight")):
            raise CheckpointError(
                f"{tensor}: quantization_config has no place for it; config.json and the shards are from different runs"
            )


def guards(modules: Mapping[str, PackedModule], files: TensorFiles) -> list[str]:
    """Names of the guards among the tensors: nothing is stored in them, and no reader of this format uses them.

    A guard has no elements and the name of a weight of the dense model that was packed. A program that does not know
    this format takes it for that weight, and stops at its shape, where it would go on with random values otherwise.
    save_pretrained of transformers lets us write nothing else that does.
    """
    return [name for name in guard_names(modules) if name in files.tensors and files.tensors[name].shape == GUARD_SHAPE]


def guard_names(modules: Mapping[str, PackedModule]) -> list[str]:
    """Names that a guard can have, in model order: those of packed weights that are tensors of the dense model too.

    Embeddings come last: programs look at theirs for the size of the vocabulary.
    """
    apart = sorted((module for module in modules.values() if module.experts is None), key=lambda m: bool(m.embedding))
    return [f"{name}.weight" for module in apart for name in module.replaced()]


def _check_tensor(
    tensors: Mapping[str, StoredTensor], where: Path, name: str, dtypes: Sequence[torch.dtype], shape: tuple[int, ...]
) -> None:
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{where}: the packed tensor {short(name)} is missing; download or pack the model again")
    if tensor.dtype not in dtypes or tensor.shape != shape:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(f"{tensor}: quantization_config asks for {wanted} {list(shape)}; pack the model again")
    if tensor.entry.start % dtypes[0].itemsize:
        raise CheckpointError(
            f"{tensor}: begins at byte {tensor.entry.start}, not a multiple of its {dtypes[0].itemsize}-byte elements, "
            "so it cannot be mapped; write the file again with save_pretrained()"
        )
