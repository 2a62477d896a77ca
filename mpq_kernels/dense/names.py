"""Which stored tensor feeds which linear of a model: transformers' model on the meta device against file headers.

    parameter of the model   "model.layers.0.mlp.up_proj.weight"
    stored as                the same, or without "model." (saved from the base model), or with it added
    tied head                lm_head.weight and embed_tokens.weight are one parameter, stored under either name or both

That is all that is mapped: a linear whose tensor transformers would rename, split or merge is refused. Experts of
mixtures, which it does merge, are mapped by experts.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..files.shards import StoredTensor
from .experts import WEIGHT_DTYPES, LeftExperts, map_experts, model_experts, routers
from .kinds import Matrix, is_embedding, is_linear, is_transposed, linear_shape, other_matrices
from .linears import LinearSpec
from .model import build_meta_model


@dataclass(frozen=True)
class ModelMap:
    """The linears, and how a tied pair is stored.

    kinds: stored tensor -> type of the module that it is a parameter of. left: parameters whose experts cannot be
    packed. tied_source: stored tensor that feeds the tied embedding, None when nothing is tied.
    tied_target: name under which a packed checkpoint stores it, so that it loads whether or not the head is packed.
    others: matrices that belong to no linear, embedding or convolution, in module order. embeddings: what can be packed
    of them, in module order.
    """

    linears: tuple[LinearSpec, ...]
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
        prefix = getattr(model, "base_model_prefix", "")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        stored = {name: _stored_name(name, prefix, tensors) for name in parameters}
        head, tied = _head(model)
        embedding = _tied_embedding(parameters, head) if tied else None
        own_name = stored[embedding] if embedding is not None else None
        if embedding is not None:
            stored[embedding] = own_name or stored[f"{head}.weight"]
            stored[f"{head}.weight"] = stored[f"{head}.weight"] or own_name
        for name, module in model.named_modules():
            if is_linear(module):
                _check_linear(path, name, module, stored, tensors)
        _check_complete(path, parameters, stored, tensors)
        scoring, heads = routers(model), other_heads(model)
        linears = tuple(
            LinearSpec(
                name,
                *linear_shape(module),
                str(stored[f"{name}.weight"]),
                stored[f"{name}.bias"] if module.bias is not None else None,
                is_head=name == head or name in heads,
                tied=name == head and embedding is not None,
                router=name in scoring,
                transposed=is_transposed(module),
            )
            for name, module in model.named_modules()
            if is_linear(module)
        )
        experts, left = map_experts(path, model, tensors)
        # In reverse, so that a tied pair is what it is first: the embedding.
        kinds = {source: _owner(model, name) for name, source in reversed(stored.items()) if source is not None}
        known = {spec.expert.module for spec in experts if spec.expert is not None}
        embeddings = tuple(_embeddings(model, stored, tensors))
        found = (kinds, left, tuple(other_matrices(model, head, known)), embeddings)
        if embedding is None:
            return cls(linears + experts, None, None, *found)
        return cls(linears + experts, stored[embedding], own_name or embedding, *found)


def _owner(model: torch.nn.Module, parameter: str) -> str:
    """Type of the module that has a parameter."""
    return type(model.get_submodule(parameter.rpartition(".")[0])).__name__


def _stored_name(name: str, prefix: str, tensors: Mapping[str, StoredTensor]) -> str | None:
    """Name of a parameter in the files: its own, or with the base model's prefix removed or added."""
    candidates = [name]
    if prefix:
        candidates += [name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]
    return next((candidate for candidate in candidates if candidate in tensors), None)


def _head(model: torch.nn.Module) -> tuple[str | None, bool]:
    """(module name of the output head, whether its weight is the input embedding)."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return None, False
    name = next(name for name, module in model.named_modules() if module is head)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return name, getattr(head, "weight", None) is getattr(embedding, "weight", head)


def other_heads(model: Any) -> set[str]:
    """Linears outside of the base model, where the model has no output embeddings: the score of a classifier."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or prefix not in model._modules or model.get_output_embeddings() is not None:
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
    stored: Mapping[str, str | None],
    tensors: Mapping[str, StoredTensor],
) -> None:
    for part, parameter in module.named_parameters():
        source = stored[f"{name}.{part}"]
        if source is None:
            raise CheckpointError(
                f"{path}: the model has a linear {name}, and no file holds {name}.{part}, with or without the base "
                "model's prefix; tensors that transformers would rename or merge cannot be packed"
            )
        tensor = tensors[source]
        if tensor.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{tensor}: the model that config.json describes has {list(parameter.shape)} for {name}.{part}; "
                "config and weights belong to different models"
            )
        if tensor.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{tensor}: weights must be fp32, fp16 or bf16 to be packed; dequantize or convert the checkpoint first"
            )


def _check_complete(
    path: Path,
    parameters: Mapping[str, torch.nn.Parameter],
    stored: Mapping[str, str | None],
    tensors: Mapping[str, StoredTensor],
) -> None:
    """Refuse a checkpoint that lacks a parameter, or holds it in another shape.

    A parameter may also come from tensors that transformers renames or merges (experts); that is possible only when
    some stored tensor has no parameter of its own.
    """
    missing = sorted(name for name, source in stored.items() if source is None)
    if missing and set(tensors) <= set(stored.values()):
        raise CheckpointError(f"{path}: no file holds {missing[0]}, which the model needs ({len(missing)} missing)")
    for name, source in stored.items():
        if source is not None and tensors[source].shape != tuple(parameters[name].shape):
            raise CheckpointError(
                f"{tensors[source]}: the model that config.json describes has {list(parameters[name].shape)} for {name}"
            )


def _embeddings(
    model: torch.nn.Module, stored: Mapping[str, str | None], tensors: Mapping[str, StoredTensor]
) -> Iterator[LinearSpec]:
    """The embeddings that can be packed; one whose tensor has another name, shape or dtype than it should is none."""
    for spec in list_embeddings(model):
        found = (stored.get(f"{name}.weight") for name in (spec.name, *spec.shared))
        sources = list(dict.fromkeys(name for name in found if name is not None))
        held = [tensors[name] for name in sources]
        shape = (spec.out_features, spec.in_features)
        if held and all(tensor.shape == shape and tensor.dtype in WEIGHT_DTYPES for tensor in held):
            yield replace(spec, tensor=sources[0], copies=tuple(sources[1:]))


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
    head = None
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()  # type: ignore[operator]  # a method of transformers models
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    scoring, heads = routers(model), other_heads(model)
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
        )
        for name, module in model.named_modules()
        if is_linear(module)
    ]
    return [*linears, *model_experts(model)]
