"""Which stored tensor feeds which linear of a model: transformers' model on the meta device against file headers.

    parameter of the model   "model.layers.0.mlp.up_proj.weight"
    stored as                the same, or without "model." (saved from the base model), or with it added; or under
                             another name, or as a part of another tensor: as transformers' own tables say
    tied head                lm_head.weight and embed_tokens.weight are one parameter, stored under either name or both

conversions.py follows those tables, experts.py has the experts of mixtures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..files.shards import StoredTensor
from .conversions import Conversion, Origin, find_origins
from .experts import WEIGHT_DTYPES, LeftExperts, map_experts, model_experts, routers
from .kinds import Matrix, is_embedding, is_linear, is_transposed, linear_shape, other_matrices
from .linears import LinearSpec
from .model import build_meta_model
from .towers import output_head, towers


@dataclass(frozen=True)
class ModelMap:
    """The linears, and how a tied pair is stored.

    origins: parameter or buffer -> where it comes from; of tied ones, each. left: parameters whose experts cannot be
    packed. tied_source: stored tensor that feeds the tied embedding, None when nothing is tied.
    tied_target: name under which a packed checkpoint stores it, so that it loads whether or not the head is packed.
    kinds: stored tensor -> type of the module that it is a parameter of.
    others: matrices that belong to no linear, embedding or convolution, in module order. embeddings: what can be packed
    of them, in module order.
    """

    linears: tuple[LinearSpec, ...]
    origins: dict[str, Origin]
    tied_source: str | None
    tied_target: str | None
    kinds: dict[str, str] = field(default_factory=dict)
    left: dict[str, LeftExperts] = field(default_factory=dict)
    others: tuple[Matrix, ...] = ()
    embeddings: tuple[LinearSpec, ...] = ()

    @classmethod
    def build(cls, path: Path, config: dict[str, Any], tensors: Mapping[str, StoredTensor]) -> ModelMap:
        """Match the model that `config` describes with `tensors`. Raises CheckpointError naming file and tensor."""
        model = build_meta_model(path)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found = find_origins(model, tensors)
        head, tied = _head(model)
        embedding = _tied_embedding(parameters, head) if tied else None
        own = found.by_parameter.get(embedding) if embedding is not None else None
        origins = _with_tied(parameters, found.by_parameter)
        for name, module in model.named_modules():
            if is_linear(module):
                _check_linear(path, name, module, origins, found.failed, tensors)
        _check_complete(path, model, origins, tensors)
        scoring, heads, other = routers(model), other_heads(model), towers(model)
        linears = tuple(
            LinearSpec(
                name,
                *linear_shape(module),
                origins[f"{name}.weight"].tensor,
                None if module.bias is None else origins[f"{name}.bias"].tensor,
                is_head=name == head or name in heads,
                tied=name == head and embedding is not None,
                router=name in scoring,
                transposed=is_transposed(module),
                tower=name in other,
                origin=_made(origins[f"{name}.weight"]),
                bias_origin=None if module.bias is None else _made(origins[f"{name}.bias"]),
            )
            for name, module in model.named_modules()
            if is_linear(module)
        )
        experts, left = map_experts(path, model, tensors, found)
        # In reverse, so that a tied pair is what it is first: the embedding.
        fed = [(tensor, name) for name in reversed(parameters) if name in origins for tensor in origins[name].tensors]
        kinds = {tensor: _owner(model, name) for tensor, name in fed}
        known = {spec.expert.module for spec in experts if spec.expert is not None}
        embeddings = tuple(_embeddings(model, origins, tensors))
        facts = (kinds, left, tuple(other_matrices(model, head, known)), embeddings)
        if embedding is None:
            return cls(linears + experts, origins, None, None, *facts)
        target = embedding if own is None else own.tensor
        return cls(linears + experts, origins, origins[embedding].tensor, target, *facts)


def _with_tied(parameters: Mapping[str, torch.nn.Parameter], origins: dict[str, Origin]) -> dict[str, Origin]:
    """Origins, with those of tied parameters: one that no file holds comes from where the other one does."""
    shared: dict[int, Origin] = {}
    for name, parameter in parameters.items():
        if name in origins:
            shared.setdefault(id(parameter), origins[name])
    tied = {name: shared[id(parameter)] for name, parameter in parameters.items() if id(parameter) in shared}
    return origins | {name: origin for name, origin in tied.items() if name not in origins}


def _made(origin: Origin) -> Origin | None:
    """An origin, None where the parameter is a stored tensor as it is."""
    return None if origin.conversion is None else origin


def _owner(model: torch.nn.Module, parameter: str) -> str:
    """Type of the module that has a parameter."""
    return type(model.get_submodule(parameter.rpartition(".")[0])).__name__


def _head(model: torch.nn.Module) -> tuple[str | None, bool]:
    """(module name of the output head, whether its weight is the input embedding)."""
    head = output_head(model)
    if head is None:
        return None, False
    name = next(name for name, module in model.named_modules() if module is head)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return name, getattr(head, "weight", None) is getattr(embedding, "weight", head)


def other_heads(model: Any) -> set[str]:
    """Linears outside of the base model, where the model has no output embeddings: the score of a classifier."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or prefix not in model._modules or output_head(model) is not None:
        return set()
    named = model.named_modules()
    return {name for name, module in named if is_linear(module) and not name.startswith(f"{prefix}.")}


def _tied_embedding(parameters: Mapping[str, torch.nn.Parameter], head: str | None) -> str:
    """Parameter name of the input embedding that shares the head's weight."""
    shared = parameters[f"{head}.weight"]
    return next(name for name, value in parameters.items() if value is shared and name != f"{head}.weight")


def _check_linear(
    path: Path,
    name: str,
    module: torch.nn.Module,
    origins: Mapping[str, Origin],
    failed: Mapping[str, Conversion],
    tensors: Mapping[str, StoredTensor],
) -> None:
    for part, parameter in module.named_parameters():
        origin = origins.get(f"{name}.{part}")
        if origin is None:
            conversion = failed.get(f"{name}.{part}")
            raise CheckpointError(
                f"{path}: the model has a linear {name}, and no file holds {name}.{part}, under this name or one that "
                f"transformers renames to it{'' if conversion is None else f'; {conversion.problem}'}"
            )
        if origin.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{tensors[origin.tensor]}: the model that config.json describes has {list(parameter.shape)} for "
                f"{name}.{part}; config and weights belong to different models"
            )
        for tensor in (tensors[stored] for stored in origin.tensors):
            if tensor.dtype not in WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{tensor}: weights must be fp32, fp16 or bf16 to be packed; dequantize or convert the checkpoint "
                    "first"
                )


def _check_complete(
    path: Path,
    model: Any,
    origins: Mapping[str, Origin],
    tensors: Mapping[str, StoredTensor],
) -> None:
    """Refuse a checkpoint that lacks a parameter, or holds it in another shape.

    Some parameters are computed and not stored, such as Marian's positions: transformers knows which. While some stored
    tensor has no parameter of its own, what seems to be missing may yet come from that: whether the model loads is
    tried later.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    computed = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = sorted(name for name in parameters if name not in origins)
    missing = [name for name in missing if not any(re.search(pattern, name) for pattern in computed)]
    used = {stored for origin in origins.values() for stored in origin.tensors}
    if missing and set(tensors) <= used:
        raise CheckpointError(f"{path}: no file holds {missing[0]}, which the model needs ({len(missing)} missing)")
    for name, parameter in parameters.items():
        origin = origins.get(name)
        if origin is not None and origin.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{tensors[origin.tensor]}: the model that config.json describes has {list(parameter.shape)} for {name}"
            )


def _embeddings(
    model: torch.nn.Module, origins: Mapping[str, Origin], tensors: Mapping[str, StoredTensor]
) -> Iterator[LinearSpec]:
    """The embeddings that can be packed; one whose stored tensors have another shape or dtype than they should is none.

    A tied weight may be stored under any of its names, and under several.
    """
    for spec in list_embeddings(model):
        found = (origins.get(f"{name}.weight") for name in (spec.name, *spec.shared))
        held = [origin for origin in found if origin is not None]
        dtypes = {tensors[name].dtype for origin in held for name in origin.tensors}
        shapes = {origin.shape for origin in held}
        if shapes == {(spec.out_features, spec.in_features)} and dtypes <= set(WEIGHT_DTYPES):
            yield replace(spec, tensor=held[0].tensor, origin=_made(held[0]))


def list_embeddings(model: nn.Module) -> list[LinearSpec]:
    """Every embedding of a model that can be packed, in module order; those that share a weight count as the first."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}  # by parameter
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((name, module))
    specs = []
    for name, module in model.named_modules():
        if not is_embedding(module) or id(module.weight) not in users:
            continue
        others = [(other, owner) for other, owner in users.pop(id(module.weight)) if owner is not module]
        if all(is_embedding(owner) or (is_linear(owner) and not is_transposed(owner)) for _, owner in others):
            rows, cols = module.get_parameter("weight").shape
            shared = tuple(other for other, _ in others)
            specs.append(LinearSpec(name, rows, cols, f"{name}.weight", embedding=True, shared=shared))
    return specs


def list_packable(model: nn.Module) -> list[LinearSpec]:
    """Every embedding of a model that can be packed, then what `list_linears` lists: all that a plan may name."""
    return [*list_embeddings(model), *list_linears(model)]


def list_linears(model: nn.Module) -> list[LinearSpec]:
    """Every linear of a model, in module order, then the linears of all experts, as its files name them."""
    head = output_head(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    scoring, heads, other = routers(model), other_heads(model), towers(model)
    linears = [
        LinearSpec(
            name,
            *linear_shape(module),
            tensor=f"{name}.weight",
            bias_tensor=None if module.bias is None else f"{name}.bias",
            is_head=module is head or name in heads,
            tied=f"{name}.weight" in tied,
            router=name in scoring,
            transposed=is_transposed(module),
            tower=name in other,
        )
        for name, module in model.named_modules()
        if is_linear(module)
    ]
    return [*linears, *model_experts(model)]
