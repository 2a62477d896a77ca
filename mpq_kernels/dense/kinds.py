"""Which modules are linears, y = x @ W[N, K].T + b and nothing else, which are embeddings, and how they store W.

    nn.Linear, FalconLinear    weight [N, K]
    Conv1D (GPT-2 and kin)     weight [K, N]

The table names exact classes, because a subclass of nn.Linear may compute something else (Dory's head scales its
logits, DeepSeek-V4's grouped linear multiplies in blocks), or be read by its owner without being called (the output
projection of nn.MultiheadAttention). A class that is not in it stays dense and is named in reports.

Embeddings are rows of W [N, K] by number and nothing else, or times one factor:

    nn.Embedding                         the row
    transformers' ...ScaledWordEmbedding   the row times `embed_scale`; where that is a tensor (Gemma), first rounded to
                                         the dtype of the weight
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

# Qualified name of a class -> whether its weight is stored as [K, N]. Names: importing transformers takes seconds.
STORES_TRANSPOSED = {
    "torch.nn.modules.linear.Linear": False,
    "transformers.models.falcon.modeling_falcon.FalconLinear": False,
    "transformers.pytorch_utils.Conv1D": True,
}
EMBEDDING = "torch.nn.modules.sparse.Embedding"
SCALED_EMBEDDING = "ScaledWordEmbedding"  # every class of transformers with this ending is one of the two forms above


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_linear(module: nn.Module) -> bool:
    """Whether the class of a module is in the table, and it holds a weight and perhaps a bias, and nothing else.

    A weight without rows is none: MobileBERT has one where its embedding is as wide as its blocks.
    """
    if _name(module) not in STORES_TRANSPOSED or not {"weight"} <= module._parameters.keys() <= {"weight", "bias"}:
        return False
    weight = module._parameters["weight"]
    return weight is None or weight.numel() > 0


def is_transposed(linear: nn.Module) -> bool:
    """Whether a linear stores its weight as [K, N]."""
    return STORES_TRANSPOSED[_name(linear)]


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(N, K): out_features and in_features of a linear."""
    first, second = linear.get_parameter("weight").shape
    return (second, first) if is_transposed(linear) else (first, second)


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks up rows of its weight, perhaps times a factor, and does nothing else."""
    name = _name(module)
    known = name == EMBEDDING or (name.startswith("transformers.models.") and name.endswith(SCALED_EMBEDDING))
    return known and set(module._parameters) == {"weight"} and getattr(module, "max_norm", None) is None


@dataclass(frozen=True)
class RowScale:
    """What an embedding multiplies its rows by. rounded: to the dtype of the weight, before anything is multiplied."""

    factor: float
    rounded: bool


def row_scale(embedding: nn.Module) -> RowScale | None:
    """The factor of an embedding, None for one without. Read beside a tensor, which may be on the meta device."""
    scale = getattr(embedding, "embed_scale", None)
    if scale is None:
        return None
    rounded = isinstance(scale, torch.Tensor)
    return RowScale(float(embedding.scalar_embed_scale if rounded else scale), rounded)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Matrix:
    """A parameter of two dimensions or more that belongs to no linear. owner: its module, of the class `kind`."""

    owner: str
    kind: str
    elements: int


def other_matrices(model: nn.Module, head: str | None, experts: set[str]) -> Iterator[Matrix]:
    """What might be the weights of linears that the table lacks: all but embeddings, convolutions and the head.

    experts: names of the modules of experts that can be packed.
    """
    for name, module in model.named_modules():
        passed = isinstance(module, nn.Embedding | _ConvNd) or is_linear(module) or name == head or name in experts
        for parameter in () if passed else module._parameters.values():
            if parameter is not None and parameter.squeeze().dim() > 1:
                yield Matrix(name, type(module).__name__, parameter.numel())
