"""What the files hold for one layer of vLLM, and which rows and columns of it this rank keeps.

    tensors of a module, as vLLM's loader brings them --> Source --(all are there)--> Kept, one for each part wanted

A rank's share of a packed weight is cut at whole supertiles (format/cut.py). Where its borders do not fall between
them, the rank keeps the smallest range around its share: `skip` rows of the result are then dropped, and x is put
among zeros for the columns that belong to others. Nothing of the uncut weight stays in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..checkpoint.config import Float8Module, PackedModule
from ..errors import CheckpointError
from ..format.cut import cover_columns, cover_rows, cut_weight
from ..format.float8 import bad_float8
from ..format.weights import TORCH_DTYPES, PackedWeight

Range = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Float8Weight:
    """A weight in float8 with a scale for each row: qweight [N, K], scales fp32 [N]."""

    qweight: torch.Tensor
    scales: torch.Tensor


Weight = PackedWeight | Float8Weight | torch.Tensor  # the last: a dense one [N, K]


@dataclass(frozen=True, eq=False)
class Kept:
    """A weight that this rank keeps.

    Of its rows, `size` from row `skip` on are wanted. Its columns are those of x between `before` and `after` zeros.
    """

    weight: Weight
    skip: int
    size: int
    before: int = 0
    after: int = 0


@dataclass(eq=False)
class Source:
    """One module of the files that a layer takes parts from.

    module: None for a dense weight. wanted: rows of each part, in the order of the layer's outputs. columns: those that
    this rank's x has; None: all.
    """

    name: str
    module: PackedModule | Float8Module | None
    wanted: list[Range]
    columns: Range | None = None
    held: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)

    def specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...] | None]]:
        """Name -> (dtype, shape) of the tensors that the files hold for it, without the bias."""
        if isinstance(self.module, PackedModule):
            specs = self.module.layout.tensor_specs()
            return {name: (TORCH_DTYPES[dtype], shape) for name, (dtype, shape) in specs.items()}
        if isinstance(self.module, Float8Module):
            return {**self.module.shape.tensor_specs()}
        return {}

    def take(self, key: str, tensor: torch.Tensor, device: torch.device) -> None:
        """Hold a tensor of the files; with the last one, cut out what this rank keeps. Raises CheckpointError."""
        if self.module is None:
            self._keep_dense(tensor, device)
            return
        spec = self.specs().get(key)
        if spec is None or (tensor.dtype, tuple(tensor.shape)) != spec:
            raise CheckpointError(
                f"{self.name}.{key} is {tensor.dtype} {list(tensor.shape)}, and config.json asks for "
                f"{'no such tensor' if spec is None else f'{spec[0]} {list(spec[1] or ())}'}; pack the model again"
            )
        self.held[key] = tensor.detach()
        if len(self.held) == len(self.specs()):
            self._cut(device)
            self.held.clear()

    def check_loaded(self) -> None:
        """Raise CheckpointError when the files did not bring every tensor."""
        if not self.kept:
            missing = sorted(self.specs().keys() - self.held.keys()) or ["weight"]
            raise CheckpointError(f"{self.name}: the files lack {', '.join(missing)}; download or pack the model again")

    def _keep_dense(self, weight: torch.Tensor, device: torch.device) -> None:
        k0, k1 = self.columns or (0, weight.shape[1])
        self.kept = [Kept(weight[n0:n1, k0:k1].to(device, copy=True), 0, n1 - n0) for n0, n1 in self.wanted]

    def _cut(self, device: torch.device) -> None:
        if isinstance(self.module, Float8Module):
            codes, scales = self.held["qweight"], self.held["scales"]
            reason = bad_float8(codes, scales)
            if reason is not None:
                raise CheckpointError(f"{self.name}: {reason}; pack the model again")
            k0, k1 = self.columns or (0, codes.shape[1])
            for n0, n1 in self.wanted:
                part = Float8Weight(
                    codes[n0:n1, k0:k1].to(device, copy=True).contiguous(), scales[n0:n1].to(device, copy=True)
                )
                self.kept.append(Kept(part, 0, n1 - n0))
            return
        assert isinstance(self.module, PackedModule)
        whole = PackedWeight(self.module.layout, **self.held)
        whole.check_values()
        layout = whole.layout
        columns = self.columns or (0, layout.in_features)
        k0, k1 = cover_columns(layout, *columns)
        for rows in self.wanted:
            n0, n1 = cover_rows(layout, *rows)
            packed = cut_weight(whole, (n0, n1), (k0, k1)).to(device)
            self.kept.append(Kept(packed, rows[0] - n0, rows[1] - rows[0], columns[0] - k0, k1 - columns[1]))

    def widened(self) -> str | None:
        """None when this rank keeps its share and no more, else what it keeps instead, in words."""
        if not isinstance(self.module, PackedModule):
            return None
        layout = self.module.layout
        says = []
        columns = self.columns or (0, layout.in_features)
        cover = cover_columns(layout, *columns)
        if cover != columns:
            whole = "all" if cover == (0, layout.in_features) else f"{cover[0]}..{cover[1]}"
            why = "they are permuted" if layout.permuted else "cuts fall on multiples of 64 between groups"
            says.append(f"columns {columns[0]}..{columns[1]}: {whole} are held ({why})")
        extra = sum(span(cover_rows(layout, *rows)) - span(rows) for rows in self.wanted)
        if extra:
            says.append(f"{extra} rows of others are held (cuts fall on multiples of 64)")
        return "; ".join(says) or None


def span(rows: Range) -> int:
    """How many."""
    return rows[1] - rows[0]


def share(full: int, part: int, rank: int) -> Range:
    """Rows of a rank that has `part` of `full`. Raises CheckpointError when there are not so many."""
    if part == full:
        return 0, full
    if (rank + 1) * part > full:
        raise CheckpointError(f"rank {rank} wants rows {rank * part}..{(rank + 1) * part} of {full}")
    return rank * part, (rank + 1) * part
