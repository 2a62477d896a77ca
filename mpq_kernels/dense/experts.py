"""The experts of mixture models: which modules hold them, and which stored tensors hold each expert.

transformers holds all experts of a layer in two 3-D parameters of one module, whatever the files hold:

    in the model   experts.gate_up_proj [E, 2 I, H], experts.down_proj [E, H, I]      or transposed, with biases
                   experts.up_proj [E, I, H] in place of the first, where there is no gate
    in the files   the same two under any name, or experts.<i>.gate_proj.weight (or .w1) and so on, which it stacks

Its own tables of renamed and merged tensors (conversions.py) say which stored tensor goes where, so no family is named
here. What has another form is not packed, and `map_experts` says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..files.shards import StoredTensor
from .conversions import STACK, Conversion, Origin, Origins
from .linears import DOWN, GATE_UP, PARTS, Cut, ExpertPart, LinearSpec

PARAMETERS = {GATE_UP: "gate_up_proj", DOWN: "down_proj"}
UNGATED = {GATE_UP: "up_proj", DOWN: "down_proj"}
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXPERT_WEIGHT = re.compile(r"(.*\.experts)\.(\d+)\.([A-Za-z0-9_]+)\.weight")


@dataclass(frozen=True)
class LeftExperts:
    """A 3-D parameter whose experts cannot be packed: why, its elements, the stored tensors that it comes from."""

    reason: str
    elements: int
    tensors: frozenset[str]


def parameters_of(experts: nn.Module) -> dict[str, str]:
    """Packed weight -> name of the 3-D parameter that holds it in an experts module."""
    return PARAMETERS if getattr(experts, "has_gate", False) else UNGATED


def parts_of(experts: nn.Module) -> dict[str, tuple[str, ...]]:
    """Packed weight -> the linears of one expert in it."""
    held = {"gate"} if not getattr(experts, "has_gate", False) else set()
    return {leaf: tuple(part for part in parts if part not in held) for leaf, parts in PARTS.items()}


def why_not_packable(experts: nn.Module) -> str | None:
    """None for an experts module of the form that is packed, else the reason why it is not.

    The form is that of transformers' experts interface: a gate or an activation, 3-D parameters gate_up_proj (up_proj
    without a gate) and down_proj, perhaps biases, and no other state.
    """
    if not hasattr(experts, "_apply_gate" if getattr(experts, "has_gate", False) else "act_fn"):
        return "its experts have no gate in transformers' experts interface"
    if getattr(experts, "has_post_expert_norm", False):
        return "each of its experts has a norm behind it"
    names = set(parameters_of(experts).values())
    wanted = names | ({f"{name}_bias" for name in names} if experts.has_bias else set())
    held = {name for name, _ in experts.named_parameters()} | {name for name, _ in experts.named_buffers()}
    if held != wanted:
        return f"its experts hold {', '.join(sorted(held))}, not {', '.join(sorted(wanted))}"
    if any(getattr(experts, name).dim() != 3 for name in names):
        return "the parameters of its experts are not three-dimensional"
    return None


def _silu_gate(experts: Any, hidden: torch.Tensor) -> torch.Tensor:
    first, second = hidden.chunk(2, dim=-1)
    gated: torch.Tensor = second * experts.act_fn(first)
    return gated


# Classes that hold experts in the same way and are not in the interface: name -> what the interface would say of them.
PLAIN = {"has_gate": True, "has_bias": False, "has_post_expert_norm": False, "is_concatenated": True}
LIKE_INTERFACE: dict[str, dict[str, Any]] = {
    # Called with the rows of every expert, sorted and equally many.
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": PLAIN | {"is_transposed": True},
    # Experts beyond those that have a down projection give back what they read.
    "transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": PLAIN | {"is_transposed": False},
}


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Name -> module of everything that takes part in transformers' experts interface, or could."""
    out = {}
    for name, module in model.named_modules():
        like = LIKE_INTERFACE.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if like is not None and not hasattr(module, "is_transposed"):
            for attribute, value in like.items():
                setattr(module, attribute, value)
            module._apply_gate = partial(_silu_gate, module)
        if hasattr(module, "is_transposed") and hasattr(module, "is_concatenated"):
            out[name] = module
    return out


def routers(model: nn.Module) -> set[str]:
    """Names of the linears beside a module of experts that score experts, or weigh a shared one: [E or 1, K]."""
    out = set()
    for name, experts in experts_modules(model).items():
        parent = name.rpartition(".")[0]
        for child, module in model.get_submodule(parent).named_children():
            if type(module) is nn.Linear and module.out_features in (1, getattr(experts, "num_experts", 1)):
                out.add(f"{parent}.{child}" if parent else child)
    return out


def expert_shapes(experts: Any) -> tuple[int, dict[str, tuple[int, int]]]:
    """(experts, {"gate_up": (N, K), "down": (N, K)}) of a packable experts module, for y = x @ W[N, K].T."""
    shapes = {}
    count = 0
    for leaf, name in parameters_of(experts).items():
        count, first, second = getattr(experts, name).shape
        shapes[leaf] = (second, first) if experts.is_transposed else (first, second)
    return count, shapes


def gate(experts: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What the down projections read, of what comes from gate and up."""
    updated: torch.Tensor = (experts._apply_gate if experts.has_gate else experts.act_fn)(hidden)
    return updated


def expert_update(experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What the down projection of one expert reads for inputs x [T, K] of its gate and up, in the dtype of x."""
    name = parameters_of(experts)[GATE_UP]
    merged = getattr(experts, name)[expert]
    out = x @ merged if experts.is_transposed else x @ merged.T
    if experts.has_bias:
        out = out + getattr(experts, f"{name}_bias")[expert]
    return gate(experts, out)


@dataclass(frozen=True)
class FileNames:
    """What the files of a model call its experts: the module of all, and the linears of one by part."""

    block: str
    linears: Mapping[str, str]


OWN_NAMES = {part: f"{part}_proj" for parts in PARTS.values() for part in parts}


def expert_cuts(experts: Any) -> dict[str, tuple[int, int, int]]:
    """Linear of an expert -> rows (start, stop, step) of the 3-D parameter, in the order N of y = x @ W[N, K].T."""
    shapes = expert_shapes(experts)[1]
    rows, half = shapes[GATE_UP][0], shapes[GATE_UP][0] // 2
    if not experts.has_gate:
        cuts = {"up": (0, rows, 1)}
    elif experts.is_concatenated:
        cuts = {"gate": (0, half, 1), "up": (half, rows, 1)}
    else:
        cuts = {"gate": (0, rows, 2), "up": (1, rows, 2)}
    return cuts | {"down": (0, shapes[DOWN][0], 1)}


Tensors = Callable[[str, int], tuple[str, Origin | None]]  # (parameter, expert) -> stored tensor, how it is made


def merged_experts(module: str, experts: Any, names: FileNames, tensors: Tensors) -> Iterator[LinearSpec]:
    """The linears of a packable experts module as cuts of 3-D tensors. tensors: what feeds each of its parameters."""
    count, shapes = expert_shapes(experts)
    cuts = expert_cuts(experts)
    for index in range(count):
        for leaf, parts in parts_of(experts).items():
            key = parameters_of(experts)[leaf]
            tensor, origin = tensors(key, index)
            bias, bias_origin = tensors(f"{key}_bias", index) if experts.has_bias else (None, None)
            for part in parts:
                start, stop, step = cuts[part]
                # Of what is made for one expert, that expert is the first.
                cut = Cut(0 if origin is not None else index, bool(experts.is_transposed), start, stop, step)
                place = ExpertPart(names.block, module, index, count, part, cut)
                shape = (len(range(start, stop, step)), shapes[leaf][1])
                name = f"{names.block}.{index}.{names.linears[part]}"
                yield LinearSpec(name, *shape, tensor, bias, expert=place, origin=origin, bias_origin=bias_origin)


def model_experts(model: Any) -> Iterator[LinearSpec]:
    """The linears of all packable experts of a model in memory, under the names that its files have for them."""
    for name, experts in experts_modules(model).items():
        if why_not_packable(experts) is None:
            held = partial(_as_it_is, name)
            yield from merged_experts(name, experts, _file_names(model, name), held)


def _as_it_is(holder: str, key: str, index: int) -> tuple[str, Origin | None]:
    return f"{holder}.{key}", None


def _file_names(model: Any, module: str) -> FileNames:
    """Names under which transformers saves the experts one by one; the model's own where it saves them merged."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model, add_legacy=False) if hasattr(model, "base_model_prefix") else []
    back = [t.reverse_transform() for t in reversed(transforms) if not isinstance(t, PrefixChange)]
    renamings = [t for t in back if isinstance(t, WeightRenaming)]
    converters = [t for t in back if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    block, linears = module, dict(OWN_NAMES)
    experts = model.get_submodule(module)
    for leaf, key in parameters_of(experts).items():
        saved, pattern = rename_source_key(f"{module}.{key}", renamings, converters, reverse=True)
        apart = EXPERT_WEIGHT.fullmatch(saved.replace(".*.", ".0."))
        if pattern is None or apart is None:
            return FileNames(_block(module, key, saved) if pattern is None else module, OWN_NAMES)
        block = apart[1]
        for part, target in zip(parts_of(experts)[leaf], by_pattern[pattern].target_patterns, strict=False):
            linears[part] = target.split(".")[-2]
    return FileNames(block, linears)


def _block(module: str, key: str, saved: str) -> str:
    """What files call the experts of a module whose parameter `key` is stored as `saved`, where that says it."""
    return saved.removesuffix(f".{key}") if saved.endswith(f".{key}") else module


def map_experts(
    path: Path, model: Any, tensors: Mapping[str, StoredTensor], origins: Origins
) -> tuple[tuple[LinearSpec, ...], dict[str, LeftExperts]]:
    """(the linears of all experts, module by module; parameters whose experts cannot be packed).

    Raises CheckpointError: an expert that no file holds, a shape or dtype that does not fit the model.
    """
    specs: list[LinearSpec] = []
    left: dict[str, LeftExperts] = {}
    for name, experts in experts_modules(model).items():
        keys = {key: parameter.numel() for key, parameter in experts.named_parameters()}
        found = {key: origins.by_parameter[f"{name}.{key}"] for key in keys if f"{name}.{key}" in origins.by_parameter}
        failed = {key: origins.failed[f"{name}.{key}"] for key in keys if f"{name}.{key}" in origins.failed}
        made = failed | {key: origin.conversion for key, origin in found.items() if origin.conversion is not None}
        reason = why_not_packable(experts)
        if reason is None and _stored_apart(experts, made):
            specs += _separate(path, name, experts, made, tensors)
            continue
        if reason is None:
            reason = next((conversion.problem for conversion in failed.values()), None) or _form(experts, found)
        if reason is None:
            specs += _merged(name, experts, found, tensors)
            continue
        for key, count in keys.items():
            stored = found[key].tensors if key in found else made[key].tensors if key in made else ()
            left[f"{name}.{key}"] = LeftExperts(reason, count, frozenset(stored))
    return tuple(specs), left


SEPARATE = {GATE_UP: ((STACK, 0), ("Concatenate", 1)), DOWN: ((STACK, 0),)}
UNGATED_SEPARATE = {GATE_UP: ((STACK, 0),), DOWN: ((STACK, 0),)}


def _form(experts: Any, found: Mapping[str, Origin]) -> str | None:
    """None when every expert can be read alone, else the reason why not."""
    if any(key not in found for key in parameters_of(experts).values()):
        return "its experts come from no stored tensor, or from one that transformers cannot place"
    count = expert_shapes(experts)[0]
    odd = [o.conversion for o in found.values() if o.conversion is not None and o.of_expert(0, count) is None]
    if not odd:
        return None
    names = sorted({name for conversion in odd for name, _ in conversion.operations})
    return f"transformers makes its experts of stored tensors in a way that is not known here ({', '.join(names)})"


def _stored_apart(experts: Any, made: Mapping[str, Conversion]) -> bool:
    """Whether each linear of each expert is a stored tensor of its own, as it is."""
    if experts.is_transposed or experts.has_bias or not experts.is_concatenated:
        return False
    forms = SEPARATE if experts.has_gate else UNGATED_SEPARATE
    conversions = {leaf: made.get(key) for leaf, key in parameters_of(experts).items()}
    return all(
        each is not None and each.operations == forms[leaf] and list(each.sources) == each.converter.source_patterns
        for leaf, each in conversions.items()
    )


def _merged(
    name: str, experts: Any, found: Mapping[str, Origin], tensors: Mapping[str, StoredTensor]
) -> Iterator[LinearSpec]:
    """Experts of 3-D tensors: as the model holds them, or made of such, or of one tensor for each expert."""
    count = expert_shapes(experts)[0]
    first = parameters_of(experts)[GATE_UP]
    block = name if found[first].conversion is not None else _block(name, first, found[first].tensor)
    for key, parameter in experts.named_parameters():
        if key not in found:
            raise CheckpointError(
                f"{tensors[found[first].tensor]}: no file holds {block}.{key} beside it, which {name} needs"
            )
        for stored in found[key].tensors:
            _check_dtype(tensors[stored])
        _check_shape(tensors[found[key].tensor], found[key].shape, tuple(parameter.shape), f"{name}.{key}")

    made = any(origin.conversion is not None for origin in found.values())

    def feeds(key: str, index: int) -> tuple[str, Origin | None]:
        origin = found[key].of_expert(index, count) if made else None
        return (found[key].tensor, None) if origin is None else (origin.tensor, origin)

    yield from merged_experts(name, experts, FileNames(block, OWN_NAMES), feeds)


def _separate(
    path: Path, name: str, experts: Any, made: Mapping[str, Conversion], tensors: Mapping[str, StoredTensor]
) -> Iterator[LinearSpec]:
    """Experts that are stored one by one, in the order of the experts: gate, up, down of each."""
    count, shapes = expert_shapes(experts)
    parts = parts_of(experts)
    shapes = {leaf: (n // len(parts[leaf]), k) for leaf, (n, k) in shapes.items()}
    held: dict[tuple[int, str], tuple[StoredTensor, re.Match[str]]] = {}
    for leaf, key in parameters_of(experts).items():
        held_there = len(getattr(experts, key))  # more than `count` where some experts only give back what they read
        for part, names in zip(parts[leaf], made[key].sources.values(), strict=True):
            for stored in names:
                match = EXPERT_WEIGHT.fullmatch(stored)
                if match is None or int(match[2]) >= held_there:
                    raise CheckpointError(
                        f"{tensors[stored]}: is not the weight of one of the {count} experts of {name}"
                    )
                held[int(match[2]), part] = (tensors[stored], match)
    for index in range(count):
        for leaf in parts:
            for part in parts[leaf]:
                if (index, part) not in held:
                    raise CheckpointError(f"{path}: no file holds the {part} weight of expert {index} of {name}")
                tensor, match = held[index, part]
                _check_shape(tensor, tensor.shape, shapes[leaf], f"the {part} weight of expert {index} of {name}")
                _check_dtype(tensor)
                place = ExpertPart(match[1], name, index, count, part)
                yield LinearSpec(tensor.name.removesuffix(".weight"), *shapes[leaf], tensor.name, expert=place)


def _check_shape(tensor: StoredTensor, found: tuple[int, ...], shape: tuple[int, ...], what: str) -> None:
    if found != shape:
        raise CheckpointError(
            f"{tensor}: the model that config.json describes has {list(shape)} for {what}; config and weights belong "
            "to different models"
        )


def _check_dtype(tensor: StoredTensor) -> None:
    if tensor.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{tensor}: weights must be fp32, fp16 or bf16 to be packed; dequantize or convert the checkpoint first"
        )
