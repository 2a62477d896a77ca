"""What packing writes, in pieces that can be made and finished one by one.

    Part     one linear (of a fused weight or of a mixture: one of its members), or one kept tensor
    Shard    one output file: parts, and the tensors that they make up together

A part knows where each of its tensors goes before it is made, so that parts need no order among each other on disk.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.safetensors import Spec, nbytes, tensor_bytes
from ..files.shards import SINGLE_FILE
from .journal import Finished


@dataclass(frozen=True)
class Made:
    """A part that was made. tensors: by name in the output. The rest as in Finished."""

    tensors: Mapping[str, torch.Tensor]
    inputs: dict[str, str]
    error: float | None = None
    zero_groups: int = 0


@dataclass(frozen=True, eq=False)
class Part:
    """name: of its own. places: tensor in the output -> (first element, elements). make: makes it.

    key: the same for a part of another plan whose bytes would be the same; what all parts share is not in it, nor are
    the values of tensors. restore: told the tensors of a part, one-dimensional, that an earlier run had finished, and
    what it noted. digests: sha256 of its inputs as they are now, as in Made.
    """

    name: str
    key: str
    places: dict[str, tuple[int, int]]
    make: Callable[[], Made]
    restore: Callable[[Mapping[str, torch.Tensor], Finished], None]
    digests: Callable[[], dict[str, str]]


@dataclass(frozen=True, eq=False)
class Unit:
    """Parts that belong into one file: those of a packed weight, or a kept tensor. specs: its tensors."""

    specs: dict[str, Spec]
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Shard:
    """One output file."""

    name: str
    units: tuple[Unit, ...]
    specs: dict[str, Spec] = field(init=False)

    def __post_init__(self) -> None:
        specs = {name: spec for unit in self.units for name, spec in unit.specs.items()}
        object.__setattr__(self, "specs", specs)
        placed = dict.fromkeys(specs, 0)
        for part in self.parts:
            for name, (start, count) in part.places.items():
                assert start == placed[name], f"{part.name} begins at {start} of {name}, not {placed[name]}"
                placed[name] += count
        assert placed == {name: math.prod(shape) for name, (_, shape) in specs.items()}, "parts leave a hole"

    @property
    def parts(self) -> list[Part]:
        """All parts, in the order in which they are made."""
        return [part for unit in self.units for part in unit.parts]


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of the bytes of tensors, one behind the other."""
    out = hashlib.sha256()
    for tensor in tensors:
        out.update(tensor_bytes(tensor))
    return out.hexdigest()


def into_shards(units: Sequence[Unit], max_bytes: int) -> list[Shard]:
    """Files of at most `max_bytes` of tensors, units in order; a larger unit gets a file of its own."""
    names: set[str] = set()
    for name in (name for unit in units for name in unit.specs):
        if name in names:
            raise CheckpointError(f"{name} names a kept and a packed tensor; choose another fuse name")
        names.add(name)
    groups: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        size = sum(map(nbytes, unit.specs.values()))
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += size
    if len(groups) == 1:
        return [Shard(SINGLE_FILE, tuple(groups[0]))]
    count = len(groups)
    return [Shard(f"model-{i:05}-of-{count:05}.safetensors", tuple(g)) for i, g in enumerate(groups, 1)]


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """The index of several files, as transformers reads it."""
    total = sum(nbytes(spec) for shard in shards for spec in shard.specs.values())
    placed = {name: shard.name for shard in shards for name in shard.specs}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
