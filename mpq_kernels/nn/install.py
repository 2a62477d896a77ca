"""Empty packed modules in a model that is being built, where its linears, experts and embeddings stand.

What config.json says of a packed model and what the model is are compared here, before anything is allocated.
"""

from __future__ import annotations

import torch
from torch import nn

from ..checkpoint.config import PackedModule, PackingConfig
from ..dense.experts import experts_modules
from ..dense.kinds import is_embedding, is_linear, linear_shape
from ..dense.linears import DOWN, GATE_UP
from ..errors import CheckpointError
from .embedding import MixedEmbedding
from .experts import GroupedLinear, why_not_fitting
from .float8 import Float8Linear
from .fused import FusedLinear
from .linear import MixedLinear
from .mlp import fuse_gates
from .replace import keep_scales, place, place_embedding, place_experts, tied_to, untie


def install_modules(model: nn.Module, packing: PackingConfig, dtype: torch.dtype | None) -> None:
    """Put empty packed modules, on the meta device, where the model's linears and experts stand.

    Raises CheckpointError when the model has no such linear, or one of another shape: a plan for another model.
    """
    modules = dict(model.named_modules())
    blocks = _blocks(packing)
    for float8 in packing.floats.values():
        shape = (float8.shape.out_features, float8.shape.in_features)
        _check_bias(float8.name, float8.bias, _has_bias(float8.name, shape, modules))
    for module in packing.modules.values():
        if module.embedding is not None:
            _check_embedding_fits(module, modules)
        elif module.experts is None:
            _check_fits(module, modules)
    for name, parts in blocks.items():
        _check_experts_fit(name, parts, modules)
    placed: list[str] = []
    compute = dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()
    for name, module in packing.modules.items():
        layer: MixedLinear
        if module.experts is not None:
            continue
        if module.embedding is not None:
            embedding = MixedEmbedding.like(modules[name], module.layout, dtype=compute, device="meta")
            placed += place_embedding(model, name, embedding, tied_to(model, name, packing.modules, module.shared))
            continue
        if module.members is None:
            layer = MixedLinear(module.layout, module.bias, dtype=compute, device="meta")
        else:
            layer = FusedLinear(module.layout, module.members, module.bias, dtype=compute, device="meta")
        placed += place(model, name, layer)
    for name, float8 in packing.floats.items():
        model.set_submodule(name, Float8Linear(float8.shape, float8.bias, compute, "meta"))
        placed.append(name)
    untie(model, placed)
    keep_scales(model)
    for name, parts in blocks.items():
        layers = {
            leaf: GroupedLinear(part.layout, part.experts.count, part.bias, dtype=compute, device="meta")
            for leaf, part in parts.items()
            if part.experts is not None
        }
        place_experts(model, name, layers)
    fuse_gates(model)


def _blocks(packing: PackingConfig) -> dict[str, dict[str, PackedModule]]:
    """Experts module of the model -> its packed weights by the last part of their names. Raises CheckpointError."""
    blocks: dict[str, dict[str, PackedModule]] = {}
    for module in packing.modules.values():
        if module.experts is not None:
            parts, leaf = blocks.setdefault(module.experts.module, {}), module.name.rpartition(".")[2]
            if leaf in parts:
                raise CheckpointError(f"{module.name}: {module.experts.module} has two packed weights named {leaf}")
            parts[leaf] = module
    return blocks


def _check_experts_fit(name: str, parts: dict[str, PackedModule], modules: dict[str, nn.Module]) -> None:
    """Raise CheckpointError unless the model has experts of these shapes there and both their weights are packed."""
    where = ", ".join(part.name for part in parts.values())
    experts = modules.get(name)
    if experts is None or name not in experts_modules(modules[""]):
        found = "has no such module" if experts is None else f"has a {type(experts).__name__} there"
        raise CheckpointError(f"{where}: packed for the experts {name}, but the model {found}: is config.json its own?")
    if set(parts) != {GATE_UP, DOWN}:
        raise CheckpointError(f"{where}: the experts {name} take a packed {GATE_UP} and a packed {DOWN}")
    for leaf, part in parts.items():
        reason = why_not_fitting(experts, leaf, part.experts.count if part.experts else 0, part.layout, part.bias)
        if reason is not None:
            raise CheckpointError(f"{part.name}: {reason}: is config.json its own?")


def _check_embedding_fits(module: PackedModule, modules: dict[str, nn.Module]) -> None:
    """Raise CheckpointError unless the model has an embedding of this shape there, and the modules that share it."""
    held = modules.get(module.name)
    if held is None or not is_embedding(held):
        found = "has no such module" if held is None else f"has a {type(held).__name__} there"
        raise CheckpointError(
            f"{module.name} is packed here as an embedding, and the model {found}: is config.json its own?"
        )
    for name in (module.name, *module.shared):
        user = modules.get(name)
        if user is None or not (is_embedding(user) or is_linear(user)):
            raise CheckpointError(
                f"{name} shares the packed weight of {module.name}, and the model has no such embedding or linear: is "
                "config.json its own?"
            )
        shape = tuple(user.get_parameter("weight").shape)
        if shape != (module.layout.out_features, module.layout.in_features):
            raise CheckpointError(
                f"{name} is packed as {module.layout.out_features} x {module.layout.in_features}, the model wants "
                f"{shape[0]} x {shape[1]}: is config.json its own?"
            )


def _check_fits(module: PackedModule, modules: dict[str, nn.Module]) -> None:
    rows = [module.layout.out_features] if module.members is None else [m.n1 - m.n0 for m in module.members]
    shapes = zip(module.replaced(), rows, strict=True)
    biases = [_has_bias(name, (n, module.layout.in_features), modules) for name, n in shapes]
    _check_bias(module.name, module.bias, any(biases))


def _has_bias(name: str, shape: tuple[int, int], modules: dict[str, nn.Module]) -> bool:
    """Whether the model's linear has a bias. Raises CheckpointError when there is none of this shape (N, K)."""
    linear = modules.get(name)
    if linear is None or not is_linear(linear):
        found = "has no such module" if linear is None else f"has a {type(linear).__name__} there"
        raise CheckpointError(f"{name} is packed in this checkpoint, but the model {found}: is config.json its own?")
    there = linear_shape(linear)
    if there != shape:
        raise CheckpointError(
            f"{name} is packed as {shape[0]} x {shape[1]}, the model wants {there[0]} x {there[1]}: is config.json its "
            "own?"
        )
    return linear.bias is not None


def _check_bias(name: str, stored: bool, wanted: bool) -> None:
    if stored != wanted:
        raise CheckpointError(f"{name}: stored {'with' if stored else 'without'} a bias, unlike the model's")
