"""Codes of one byte each, with a sign: those of torchao and of optimum-quanto's qint8.

    codes int8 [N, K]   scale [N, groups]   zero int8 [N, groups], or none      W[n, k] = (code - zero) * scale

2^(bits-1) is added to codes and zeros. What lies outside of its width is refused when it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from ..files.shards import StoredTensor, TensorFiles
from ..format.weights import QuantizedWeight
from .columns import Columns
from .stored import FLOATS, check_matrix
from .weight import ForeignWeight


@dataclass(frozen=True)
class SignedCodes:
    """The tensors of one weight. program: for reports."""

    name: str
    program: str
    bits: int
    codes: StoredTensor
    scale: StoredTensor
    zero: StoredTensor | None = None

    def weight(self, files: TensorFiles) -> ForeignWeight:
        """What is imported. Raises CheckpointError for shapes that do not go together."""
        rows, cols = check_matrix(self.codes, (torch.int8,), "codes")
        held, groups = check_matrix(self.scale, FLOATS, "scales")
        if held != rows or cols % groups:
            raise CheckpointError(f"{self.scale}: these are no scales of {self.codes}")
        if self.zero is not None and (self.zero.shape != self.scale.shape or self.zero.dtype != torch.int8):
            raise CheckpointError(f"{self.zero}: these are no zero points of {self.codes} with {self.scale}")
        columns = Columns.uniform(cols, cols // groups, str(self.codes))
        middle = self.zero is None or not bool(files.read(self.zero.name).any())
        # The zero of one bit without zero points is between its codes here, and not the upper one.
        kind = "none" if middle and self.bits > 1 else "int"
        layout = columns.layout(rows, self.bits, kind, self.scale.dtype)
        symmetry = "symmetric" if middle else "zero points"
        says = f"{self.program}, {self.bits} bits, {columns.in_words()}, {symmetry}"
        parts = tuple(part for part in (self.codes, self.scale, self.zero) if part is not None)

        def make(files: TensorFiles) -> QuantizedWeight:
            scales = files.read(self.scale.name)
            zeros = None
            if kind != "none":
                zero = torch.zeros(scales.shape, dtype=torch.int8) if self.zero is None else files.read(self.zero.name)
                zeros = self._unsigned(zero)
            return columns.weight(self.bits, self._unsigned(files.read(self.codes.name)), scales, zeros)

        return ForeignWeight(self.name, parts, columns, layout, says, make)

    def _unsigned(self, values: torch.Tensor) -> torch.Tensor:
        half = 1 << (self.bits - 1)
        if int(values.min()) < -half or int(values.max()) >= half:
            raise CheckpointError(f"{self.codes}: a code or a zero point does not fit {self.bits} bits")
        return (values.to(torch.int16) + half).to(torch.uint8)
