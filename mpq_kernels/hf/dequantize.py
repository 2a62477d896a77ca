"""A packed model becomes the dense one that it computes: `model.dequantize()`, and what that does.

    MixedLinear, FusedMember     the linear that the model's class has there, with the dequantized weight
    PackedExperts                the family's own module again, with its 3-D parameters
    GatedMLP                     the family's own module again, around the dense projections
    FusedLinear                  gone

Each packed weight is let go of before the next one is made dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..dense.experts import parameters_of
from ..dense.kinds import is_linear, is_transposed
from ..dense.linears import PARTS
from ..errors import UnsupportedError
from ..nn.experts import GroupedLinear, PackedExperts
from ..nn.fused import FusedLinear, FusedMember
from ..nn.linear import MixedLinear, packed_modules
from ..nn.mlp import GatedMLP


def dequantize_model(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Make a packed transformers model dense, in place: the very values of its packed weights, rounded once to dtype.

    dtype: of all weights, None for the model's own; torch.float32 loses nothing. A head that was packed beside a tied
    embedding stays apart from it, in config too. `save_pretrained` then writes a plain checkpoint. Returns the model.
    Raises UnsupportedError for a model whose weights are offloaded, or that was changed since it was loaded.
    """
    _check(model)
    wanted = dtype or model.dtype
    with torch.device("meta"):
        plain = type(model)(model.config)
    linears = _linears(model)
    for name in linears:
        if not is_linear(dict(plain.named_modules()).get(name, nn.Identity())):
            raise UnsupportedError(f"{name} is no linear of a {type(model).__name__}: take adapters off first")
    _part_from_embedding(model, plain, set(linears))
    for name, module in list(model.named_modules()):
        if isinstance(module, GatedMLP):
            family = module.__dict__["_family"][0]
            family._modules.update(module._modules)
            model.set_submodule(name, family.train(module.training))
        elif isinstance(module, PackedExperts):
            _fill_experts(module, wanted)
            model.set_submodule(name, module.family.train(module.training))
    owners = [name for name, module in model.named_modules() if isinstance(module, FusedLinear)]
    for name, packed in linears.items():
        model.set_submodule(name, _filled(plain.get_submodule(name), packed, wanted).train(packed.training))
    for name in owners:
        parent, _, leaf = name.rpartition(".")
        del model.get_submodule(parent)._modules[leaf]
    return model.to(wanted) if wanted != model.dtype else model


def _check(model: Any) -> None:
    for name, module in packed_modules(model):
        if module.qweight.is_meta:
            raise UnsupportedError(f"{name} is offloaded: load the model whole to make it dense")


def _linears(model: nn.Module) -> dict[str, MixedLinear | FusedMember]:
    """Name -> what stands where the model had a linear."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MixedLinear | FusedMember) and not isinstance(module, FusedLinear | GroupedLinear)
    }


def _filled(linear: nn.Module, packed: MixedLinear | FusedMember, dtype: torch.dtype) -> nn.Module:
    """An empty linear with the values of a packed one."""
    weight = packed.dequantize(dtype)
    values = {"weight": weight.T.contiguous() if is_transposed(linear) else weight.contiguous()}
    if linear.bias is not None and packed.bias is not None:
        values["bias"] = packed.bias.detach().to(weight.device, dtype).clone()
    for name, value in values.items():
        linear.register_parameter(name, nn.Parameter(value))
    return linear


def _fill_experts(packed: PackedExperts, dtype: torch.dtype) -> None:
    """Give the family's module its parameters back."""
    family: Any = packed.family
    for leaf, name in parameters_of(family).items():
        layer: GroupedLinear = getattr(packed, leaf)
        experts = [_parted(layer.dequantize_expert(i, dtype), leaf, family) for i in range(layer.experts)]
        stacked = torch.stack([expert.T if family.is_transposed else expert for expert in experts])
        family.register_parameter(name, nn.Parameter(stacked.contiguous()))
        if layer.bias is not None:
            rows = layer.bias.detach().to(dtype).view(layer.experts, -1)
            bias = torch.stack([_parted(row, leaf, family) for row in rows])
            family.register_parameter(f"{name}_bias", nn.Parameter(bias))


def _parted(rows: torch.Tensor, leaf: str, family: Any) -> torch.Tensor:
    """Rows of one expert in the order that its family has: gate and up above each other, or in turn."""
    count = len(PARTS[leaf])
    if count == 1 or not family.has_gate or family.is_concatenated:
        return rows
    return rows.unflatten(0, (count, len(rows) // count)).transpose(0, 1).flatten(0, 1)


def _part_from_embedding(model: Any, plain: Any, names: set[str]) -> None:
    """Where one of these linears shares its weight in the plain model, share nothing: config says it for all."""
    shared = plain.all_tied_weights_keys
    if not any(weight.removesuffix(".weight") in names for pair in shared.items() for weight in pair):
        return
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = {}
    held = dict(model.named_parameters(remove_duplicate=False))
    for weight in shared:
        if weight in held:
            owner, _, leaf = weight.rpartition(".")
            own = nn.Parameter(held[weight].detach().clone(), requires_grad=held[weight].requires_grad)
            model.get_submodule(owner).register_parameter(leaf, own)
