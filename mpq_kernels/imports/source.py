"""A quantized checkpoint made into one that the packer takes: every quantized weight as the dense one that it means.

    model.layers.0.mlp.up_proj.qweight, .qzeros, .scales, .g_idx   ->   model.layers.0.mlp.up_proj.weight [N, K]

So linears, experts and embeddings are found as in a dense checkpoint, whatever the files call them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..dense.checkpoint import CONFIG_FILE, DenseCheckpoint, compute_dtype
from ..dense.conversions import Table
from ..dense.kinds import is_linear, is_transposed
from ..dense.linears import LinearSpec
from ..dense.model import build_meta_model
from ..errors import CheckpointError
from ..files.safetensors import NAMES, TensorEntry
from ..files.shards import StoredTensor
from .formats import AUTO, FORMATS, find_format
from .stored import SIDE_FILES, Stored
from .weight import ForeignTensor, ForeignWeight, Found


@dataclass(frozen=True, eq=False)
class ForeignCheckpoint(DenseCheckpoint):
    """format: its name in FORMATS. weights: by module, as the files name it. notes: for the report.

    experts: as in Found.
    """

    format: str = ""
    weights: dict[str, ForeignWeight] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    experts: dict[str, Callable[[LinearSpec], ForeignWeight]] = field(default_factory=dict)

    @classmethod
    def open_as(cls, model_dir: str | os.PathLike[str], form: str = AUTO) -> ForeignCheckpoint:
        """Find out what is quantized and how. Reads headers, and of values only zeros and the order of columns.

        form: a key of FORMATS, or "auto". Raises CheckpointError for what cannot be imported exactly.
        """
        stored = Stored.open(model_dir)
        form = find_format(stored, form)
        found = FORMATS[form].read(stored)
        dtype = compute_dtype(stored.path / CONFIG_FILE, stored.config, stored.files)
        tensors = _tensors(stored, found, dtype)
        return cls(
            stored.path,
            stored.config,
            dtype,
            stored.files,
            tensors,
            form,
            found.weights,
            tuple(found.notes),
            found.experts,
        )

    def other_files(self) -> list[str]:
        """Files to carry along: not those that say how the source was quantized."""
        return [name for name in super().other_files() if name not in SIDE_FILES]

    def left_files(self) -> dict[str, str]:
        """Name -> reason of what is neither read nor carried along."""
        said = {name: "says how the source was quantized" for name in super().other_files() if name in SIDE_FILES}
        return super().left_files() | said


def _tensors(stored: Stored, found: Found, dtype: torch.dtype) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint: those of quantized weights as the dense one. dtype: of the dense ones."""
    model = build_meta_model(stored.path)
    table = Table(model)
    out: dict[str, StoredTensor] = {}
    dropped: set[str] = set()
    for name, weight in found.weights.items():
        tensor = f"{name}.weight"
        if tensor in stored.tensors and tensor not in found.used:
            raise CheckpointError(f"{stored.tensors[tensor]}: {name} is also stored quantized; keep one")
        owner = _owner(model, table, tensor)
        transposed = owner is not None and is_linear(owner) and is_transposed(owner)
        shape = (weight.layout.out_features, weight.layout.in_features)
        entry = TensorEntry(NAMES[dtype], shape[::-1] if transposed else shape, 0, _bytes(weight))
        out[tensor] = ForeignTensor(tensor, weight.parts[0].file, entry, weight.parts, None, weight, transposed)
        if owner is not None and getattr(owner, "bias", None) is None and _is_zero(stored, f"{name}.bias"):
            dropped.add(f"{name}.bias")
    if dropped:
        found.notes.append(f"{len(dropped)} biases are zeros, and the model has none there: they are left out")
    kept = {name: tensor for name, tensor in stored.tensors.items() if name not in found.used | dropped}
    return kept | out | found.tensors


def _owner(model: Any, table: Table, tensor: str) -> Any:
    """The module of the model that a stored weight becomes the weight of; None where it is a part of another one."""
    target, pattern = table.target(tensor)
    if pattern is not None or target not in table.state:
        return None
    return model.get_submodule(target.rpartition(".")[0])


def _is_zero(stored: Stored, name: str) -> bool:
    """Whether there is such a tensor, and it is zeros: AutoGPTQ writes biases for linears that have none."""
    if name not in stored.tensors or len(stored.tensors[name].shape) != 1:
        return False
    return not bool(stored.files.read(name).any())


def _bytes(weight: ForeignWeight) -> int:
    return sum(part.entry.nbytes for part in weight.parts)
