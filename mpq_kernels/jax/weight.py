"""A packed weight as JAX sees it: a pytree of arrays, whose layout is static."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ..checkpoint.packed import PackedCheckpoint
from ..format.layout import WeightLayout
from ..format.weights import PackedWeight

# numpy knows no bfloat16; jax brings one. The bits are moved as integers.
BITS = {torch.bfloat16: (torch.int16, jnp.bfloat16)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weight:
    """The tensors of one packed weight [N, K], all one-dimensional, and its bias [N]. Source: docs/format.md.

    zeros, perm, bias: None where the weight has none. experts: how many are stacked in it, 0 for others.
    """

    qweight: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    perm: jax.Array | None
    bias: jax.Array | None
    layout: WeightLayout = field(metadata={"static": True})
    experts: int = field(default=0, metadata={"static": True})

    @property
    def out_features(self) -> int:
        """N."""
        return self.layout.out_features

    @property
    def in_features(self) -> int:
        """K."""
        return self.layout.in_features

    @classmethod
    def from_packed(cls, weight: PackedWeight, bias: torch.Tensor | None = None, experts: int = 0) -> Weight:
        """The same weight, its tensors copied to jax's default device."""
        tensors = {name: array_of(getattr(weight, name)) for name in ("qweight", "scales", "zeros", "perm")}
        return cls(**tensors, bias=array_of(bias), layout=weight.layout, experts=experts)


def array_of(tensor: torch.Tensor | None) -> jax.Array | None:
    """A tensor as an array of the same dtype and bits; None for None."""
    if tensor is None:
        return None
    integers, dtype = BITS.get(tensor.dtype, (None, None))
    held = tensor.detach().cpu() if integers is None else tensor.detach().cpu().view(integers)
    values: np.ndarray = held.numpy()
    return jnp.asarray(values if dtype is None else values.view(dtype))


def load(directory: str | os.PathLike[str]) -> dict[str, Weight]:
    """The packed modules of a directory that `mpq pack` wrote, by name, in the order of the model.

    Raises CheckpointError for what is no such directory. Tensors that were not packed are read with safetensors' own
    `safetensors.flax.load_file`.
    """
    checkpoint = PackedCheckpoint.open(directory)
    weights = {}
    for name, module in checkpoint.modules.items():
        experts = module.experts.count if module.experts else 0
        weights[name] = Weight.from_packed(checkpoint.weight(name), checkpoint.bias(name), experts)
        checkpoint.release(name)
    return weights
