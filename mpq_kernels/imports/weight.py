"""One quantized weight of another format: what is known of it before its codes are read, and how they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from ..dense.decoded import DecodedTensor
from ..dense.linears import LinearSpec
from ..errors import CheckpointError, FormatError
from ..files.shards import StoredTensor, TensorFiles
from ..format.layout import WeightLayout
from ..format.reference import dequantize
from ..format.weights import QuantizedWeight
from .columns import Columns


@dataclass(frozen=True, eq=False)
class ForeignWeight:
    """The weight [N, K] of a module, exactly as codes of ours.

    name: of the module, as the files have it. parts: all stored tensors that it is made of. make: reads its codes.
    says: how it is stored, for reports. pieces: what of the parts it is made of, where that is not all of them.
    """

    name: str
    parts: tuple[StoredTensor, ...]
    columns: Columns
    layout: WeightLayout
    says: str
    make: Callable[[TensorFiles], QuantizedWeight]
    pieces: Callable[[TensorFiles], Iterable[torch.Tensor]] | None = None

    def stored(self, files: TensorFiles) -> Iterable[torch.Tensor]:
        """All that is read for it."""
        return (files.read(part.name) for part in self.parts) if self.pieces is None else self.pieces(files)

    def read(self, files: TensorFiles) -> QuantizedWeight:
        """The codes. Raises CheckpointError for values that no such file should hold."""
        try:
            made = self.make(files)
        except FormatError as error:
            raise CheckpointError(f"{self.parts[0].file}: {self.name}: {error}") from error
        if made.layout != self.layout:
            raise CheckpointError(f"{self.parts[0].file}: {self.name} has changed since it was looked at")
        return made

    def release(self, files: TensorFiles) -> None:
        """Give back the memory that its stored bytes took."""
        for part in self.parts:
            files.release(part.name)


@dataclass(frozen=True, slots=True)
class ForeignTensor(DecodedTensor):
    """The dense weight of a module that is stored quantized. transposed: the model has it as [K, N]."""

    weight: ForeignWeight | None = None
    transposed: bool = False

    def read(self, files: TensorFiles, index: int | None = None) -> torch.Tensor:
        """The dequantized weight: in fp32, rounded once. Raises CheckpointError."""
        assert self.weight is not None and index is None
        dense = dequantize(self.weight.read(files), self.dtype)
        self.weight.release(files)
        return dense.T.contiguous() if self.transposed else dense


@dataclass
class Found:
    """What the reader of a format finds in a checkpoint.

    weights: by module. used: names of all stored tensors that belong to them. notes: what is not as the files say, for
    reports. experts: of tensors that hold the linears of many experts, what makes the weight of one; tensors: those, as
    the dense ones that they mean.
    """

    weights: dict[str, ForeignWeight] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    experts: dict[str, Callable[[LinearSpec], ForeignWeight]] = field(default_factory=dict)
    tensors: dict[str, DecodedTensor] = field(default_factory=dict)

    def add(self, weight: ForeignWeight) -> None:
        """Take a weight and all its tensors."""
        self.weights[weight.name] = weight
        self.used.update(part.name for part in weight.parts)
