"""A packed model becomes the dense one that it computes: `model.dequantize()`, and what that does.

    MixedLinear, FusedMember,    the linear that the model's class has there, with the dequantized weight
    Float8Linear
    MixedEmbedding               the embedding that it has there; what is tied to it, tied again
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
from ..nn.embedding import MixedEmbedding, TiedEmbedding, TiedLinear
from ..nn.experts import GroupedLinear, PackedExperts
from ..nn.float8 import Float8Linear, float8_modules
from ..nn.fused import FusedLinear, FusedMember
from ..nn.linear import MixedLinear, packed_modules
from ..nn.mlp import GatedMLP

Packed = MixedLinear | FusedMember | Float8Linear
Looked = MixedEmbedding | TiedEmbedding | TiedLinear


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
    linears, embeddings = _linears(model), _embeddings(model)
    for name in linears:
        if not is_linear(dict(plain.named_modules()).get(name, nn.Identity())):
            raise UnsupportedError(f"{name} is no linear of a {type(model).__name__}: take adapters off first")
    parted = _part_from_embedding(model, plain, set(linears))
    if embeddings and not parted:
        _restore_ties(model, plain)
    for name, module in list(model.named_modules()):
        if isinstance(module, GatedMLP):
            family = module.__dict__["_family"][0]
            family._modules.update(module._modules)
            model.set_submodule(name, family.train(module.training))
        elif isinstance(module, PackedExperts):
            _fill_experts(module, wanted)
            model.set_submodule(name, module.family.train(module.training))
    _place_embeddings(model, plain, embeddings, wanted, parted)
    owners = [name for name, module in model.named_modules() if isinstance(module, FusedLinear)]
    for name, packed in linears.items():
        model.set_submodule(name, _filled(plain.get_submodule(name), packed, wanted).train(packed.training))
    for name in owners:
        parent, _, leaf = name.rpartition(".")
        del model.get_submodule(parent)._modules[leaf]
    return model.to(wanted) if wanted != model.dtype else model


def _check(model: Any) -> None:
    for name, module in (*packed_modules(model), *float8_modules(model)):
        if module.qweight.is_meta:
            raise UnsupportedError(f"{name} is offloaded: load the model whole to make it dense")


def _linears(model: nn.Module) -> dict[str, Packed]:
    """Name -> what stands where the model had a linear with a weight of its own."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Packed) and not isinstance(module, FusedLinear | GroupedLinear | MixedEmbedding)
    }


def _embeddings(model: nn.Module) -> dict[str, Looked]:
    """Name -> what stands where the model had an embedding, or a head that is tied to one; owners first."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Looked)}
    return dict(sorted(found.items(), key=lambda item: not isinstance(item[1], MixedEmbedding)))


def _place_embeddings(model: Any, plain: Any, found: dict[str, Looked], dtype: torch.dtype, parted: bool) -> None:
    """Put dense embeddings in place, and what shares their weight; a copy of it where nothing is shared any more."""
    weights: dict[MixedEmbedding, nn.Parameter] = {}
    for name, packed in found.items():
        dense: Any = plain.get_submodule(name)
        owner = packed if isinstance(packed, MixedEmbedding) else packed.owner
        if owner not in weights:
            weights[owner] = nn.Parameter(owner.dequantize(dtype))
        shared = weights[owner]
        dense.register_parameter("weight", nn.Parameter(shared.detach().clone()) if parted else shared)
        if isinstance(packed, TiedLinear):
            dense.register_parameter("bias", packed.get_parameter("bias") if dense.bias is not None else None)
        elif packed.scale is not None:
            for key, buffer in dense.named_buffers():  # the factor, where it is no plain number
                dense.register_buffer(key, torch.tensor(packed.scale.factor, dtype=buffer.dtype), persistent=False)
        model.set_submodule(name, dense.to(shared.device).train(packed.training))


def _restore_ties(model: Any, plain: Any) -> None:
    """Share again what the plain model shares."""
    for name, module in plain.named_modules():
        if hasattr(module, "all_tied_weights_keys"):
            tied = model.get_submodule(name)
            tied.all_tied_weights_keys = module.all_tied_weights_keys
            tied.__dict__.pop("_tied_weights_keys", None)


def _filled(linear: Any, packed: Any, dtype: torch.dtype) -> nn.Module:
    """An empty linear with the values of a packed one."""
    weight = packed.dequantize(dtype)
    values = {"weight": weight.T.contiguous() if is_transposed(linear) else weight.contiguous()}
    if linear.bias is not None and packed.bias is not None:
        values["bias"] = packed.bias.detach().to(weight.device, dtype).clone()
    for name, value in values.items():
        linear.register_parameter(name, nn.Parameter(value))
    made: nn.Module = linear
    return made


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


def _part_from_embedding(model: Any, plain: Any, names: set[str]) -> bool:
    """Where one of these linears shares its weight in the plain model, share nothing: config says it for all.

    Returns whether that was so.
    """
    shared = plain.all_tied_weights_keys
    if not any(weight.removesuffix(".weight") in names for pair in shared.items() for weight in pair):
        return False
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
    return True
