"""The linears of a packed directory one by one, whatever they are packed together with, under their dense names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.config import WEIGHTS_KEY
from ..checkpoint.manifest import MANIFEST_FILE
from ..checkpoint.packed import PackedCheckpoint
from ..dense.checkpoint import CONFIG_FILE
from ..dense.companions import companions
from ..dense.conversions import Table
from ..dense.kinds import is_linear, is_transposed
from ..dense.model import build_meta_model
from ..errors import CheckpointError
from ..files.safetensors import Spec
from ..files.shards import INDEX_FILE
from ..format.layout import WeightLayout
from ..format.weights import PackedWeight

SHOWN = 5  # refused linears that are named


@dataclass(frozen=True)
class Linear:
    """Rows n0..n1 of a packed module, which are one linear (or embedding) of the dense model.

    name: of the dense model's module. layout: None for a linear in float8. bias: whether it has one. transposed: the
    dense model has the weight as [K, N].
    """

    name: str
    module: str
    n0: int
    n1: int
    cols: int
    layout: WeightLayout | None
    bias: bool
    embedding: bool
    transposed: bool

    @property
    def rows(self) -> int:
        """N."""
        return self.n1 - self.n0


@dataclass(frozen=True, eq=False)
class PackedSource:
    """checkpoint: the packed directory. model: that of its config, without weights."""

    checkpoint: PackedCheckpoint
    model: Any

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> PackedSource:
        """Check config.json and every header. Raises CheckpointError."""
        checkpoint = PackedCheckpoint.open(directory)
        return cls(checkpoint, build_meta_model(checkpoint.path))

    @property
    def path(self) -> Path:
        """The packed directory."""
        return self.checkpoint.path

    @cached_property
    def linears(self) -> list[Linear]:
        """Every linear that is packed. Raises CheckpointError for one that no file of the dense model would hold."""
        table, out = Table(self.model), []
        for name, module in self.checkpoint.modules.items():
            row = 0
            for member, dense in zip(module.members or (None,), module.replaced(), strict=True):
                n0, n1 = (0, module.layout.out_features) if member is None else (member.n0, member.n1)
                layout = module.layout if member is None else module.layout.rows(n0, n1)[0]
                out.append(
                    self._linear(table, dense, name, (n0, n1), layout, module.bias, module.embedding is not None)
                )
                row = n1
            assert row == module.layout.out_features
        for name, float8 in self.checkpoint.packing.floats.items():
            out.append(self._linear(table, name, name, (0, float8.shape.out_features), None, float8.bias, False))
        return out

    def _linear(
        self,
        table: Table,
        dense: str,
        module: str,
        rows: tuple[int, int],
        layout: WeightLayout | None,
        bias: bool,
        embedding: bool,
    ) -> Linear:
        target, pattern = table.target(f"{dense}.weight")
        if target not in table.state:
            raise CheckpointError(
                f"{self.path}: {dense}: the files of this model hold its experts in one tensor, which is not written; "
                "`model.dequantize()` and `save_pretrained` make the dense model"
            )
        owner = None if pattern is not None else self.model.get_submodule(target.rpartition(".")[0])
        # A packed weight has a bias where one of its members has: those of the others are zeros.
        has_bias = bias and (owner is None or getattr(owner, "bias", None) is not None)
        transposed = owner is not None and is_linear(owner) and is_transposed(owner)
        cols = self.checkpoint.packing.floats[module].shape.in_features if layout is None else layout.in_features
        return Linear(dense, module, *rows, cols, layout, has_bias, embedding, transposed)

    def weight(self, linear: Linear) -> PackedWeight:
        """The packed weight of a linear that is not in float8, as a view."""
        whole = self.checkpoint.weight(linear.module)
        return whole if linear.rows == whole.layout.out_features else whole.rows(linear.n0, linear.n1)

    def bias(self, linear: Linear) -> torch.Tensor:
        """[N] of a linear that has one."""
        return self.checkpoint.read(f"{linear.module}.bias")[linear.n0 : linear.n1]

    def bias_spec(self, linear: Linear) -> dict[str, Spec]:
        """The bias as a tensor of the output; {} without one."""
        if not linear.bias:
            return {}
        return {f"{linear.name}.bias": (self.checkpoint.tensors[f"{linear.module}.bias"].dtype, (linear.rows,))}

    def release(self, linear: Linear) -> None:
        """Give back the memory that reading its module took."""
        lead = f"{linear.module}."
        for leaf in ("qweight", "scales", "zeros", "perm", "bias"):
            if lead + leaf in self.checkpoint.tensors:
                self.checkpoint.files.release(lead + leaf)

    def has_no(self, reasons: Sequence[tuple[str, str]], target: str) -> None:
        """Raise CheckpointError where there are reasons (linear, why) against a target."""
        if reasons:
            more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
            listed = "; ".join(f"{name} {why}" for name, why in reasons[:SHOWN])
            raise CheckpointError(f"{self.path}: cannot be written as {target}: {listed}{more}")

    def config(self) -> dict[str, Any]:
        """config.json of the dense model."""
        gone = ("quantization_config", WEIGHTS_KEY)
        config = {key: value for key, value in self.checkpoint.config.items() if key not in gone}
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        if any(f"{linear.name}.weight" in tied for linear in self.linears):  # packed apart from the embedding
            for each in (config, *(value for value in config.values() if isinstance(value, dict))):
                if "tie_word_embeddings" in each:
                    each["tie_word_embeddings"] = False
            config["tie_word_embeddings"] = False
        return config

    def carried(self) -> list[str]:
        """Tokenizer, chat templates and all else that is copied."""
        used = {file.name for file in self.checkpoint.files.files} | {CONFIG_FILE, INDEX_FILE, MANIFEST_FILE}
        return [name for name, reason in companions(self.path, used).items() if reason is None]
