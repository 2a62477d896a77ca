"""A packed model as an exported program: one graph of torch's operators and `torch.ops.mpq.*`, weights inside.

    model --torch.export--> ExportedProgram --AOTInductor--> .pt2, which runs without Python

Whoever runs either needs torch and the library of the operators (`operator_library`), and nothing else of this package.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backends.ops import LIBRARY
from ..errors import UnsupportedError
from ..nn.linear import packed_modules

MOST_SEQUENCES = 1024


class Logits(nn.Module):
    """What is exported: the whole prompt in one pass, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """input_ids, attention_mask: int64 (batch, length), 0 where there is padding. Returns logits (..., tokens)."""
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def operator_library() -> Path:
    """The shared library with the operators: for `torch.ops.load_library`, or dlopen in a program with libtorch."""
    return LIBRARY


@torch.no_grad()
def export_logits(model: Any, longest: int | None = None) -> torch.export.ExportedProgram:
    """`Logits` of a loaded causal model as a program for any batch size and any length from 2 to `longest` tokens.

    longest: the positions of the model unless given. Raises UnsupportedError for backends that are no operators of the
    library.
    """
    for name, layer in packed_modules(model):
        if layer.backend not in ("cpu", "cuda"):
            raise UnsupportedError(
                f"{name} runs on the backend {layer.backend}, which needs this package: load the model with cpu or cuda"
            )
    if longest is None:
        longest = int(model.config.get_text_config(decoder=True).max_position_embeddings)
    batch, length = torch.export.Dim("batch", min=1, max=MOST_SEQUENCES), torch.export.Dim("length", min=2, max=longest)
    ids = torch.zeros(2, min(7, longest), dtype=torch.long, device=model.device)
    return torch.export.export(
        Logits(model), (ids, torch.ones_like(ids)), dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length})
    )


def compile_package(program: torch.export.ExportedProgram, path: str | os.PathLike[str]) -> Path:
    """Compile an exported program with AOTInductor into a package `path` (.pt2), for its device. Returns the path."""
    made = torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(path))
    return Path(made)
