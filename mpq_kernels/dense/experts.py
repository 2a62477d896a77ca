"""The experts of mixture models: which modules hold them, and which stored tensors hold each expert.

transformers holds all experts of a layer in two 3-D parameters of one module, whatever the files hold:

    in the model   experts.gate_up_proj [E, 2 I, H], experts.down_proj [E, H, I]      or transposed, with biases
    in the files   the same two, or experts.<i>.gate_proj.weight (or .w1) and so on, which it stacks while it loads

Its own tables of renamed and merged tensors say which stored tensor goes where, so no family is named here. What has
another form is not packed, and `map_experts` says why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..files.shards import StoredTensor
from .linears import DOWN, GATE_UP, PARTS, Cut, ExpertPart, LinearSpec

PARAMETERS = {GATE_UP: "gate_up_proj", DOWN: "down_proj"}
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXPERT_WEIGHT = re.compile(r"(.*\.experts)\.(\d+)\.([A-Za-z0-9_]+)\.weight")


@dataclass(frozen=True)
class Source:
    """A stored tensor that feeds a 3-D parameter: as it is (operations None), or as one input of a conversion.

    place: which of the conversion's inputs it is. operations: what is done with them, as (name, dimension).
    """

    tensor: StoredTensor
    place: int = 0
    operations: tuple[tuple[str, int | None], ...] | None = None


@dataclass(frozen=True)
class LeftExperts:
    """A 3-D parameter whose experts cannot be packed: why, its elements, the stored tensors that it comes from."""

    reason: str
    elements: int
    tensors: frozenset[str]


def why_not_packable(experts: nn.Module) -> str | None:
    """None for an experts module of the form that is packed, else the reason why it is not.

    The form is that of transformers' experts interface: a gate, 3-D parameters gate_up_proj and down_proj, perhaps
    biases, and no other state.
    """
    if not getattr(experts, "has_gate", False) or not hasattr(experts, "_apply_gate"):
        return "its experts have no gate in transformers' experts interface"
    if getattr(experts, "has_post_expert_norm", False):
        return "each of its experts has a norm behind it"
    wanted = set(PARAMETERS.values())
    if experts.has_bias:
        wanted |= {f"{name}_bias" for name in wanted}
    held = {name for name, _ in experts.named_parameters()} | {name for name, _ in experts.named_buffers()}
    if held != wanted:
        return f"its experts hold {', '.join(sorted(held))}, not {', '.join(sorted(wanted))}"
    if any(getattr(experts, name).dim() != 3 for name in PARAMETERS.values()):
        return "the parameters of its experts are not three-dimensional"
    return None


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Name -> module of everything that takes part in transformers' experts interface."""
    named = model.named_modules()
    return {name: m for name, m in named if hasattr(m, "is_transposed") and hasattr(m, "is_concatenated")}


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
    for leaf, name in PARAMETERS.items():
        count, first, second = getattr(experts, name).shape
        shapes[leaf] = (second, first) if experts.is_transposed else (first, second)
    return count, shapes


def expert_update(experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What the down projection of one expert reads for inputs x [T, K] of its gate and up, in the dtype of x."""
    merged = experts.gate_up_proj[expert]
    out = x @ merged if experts.is_transposed else x @ merged.T
    if experts.has_bias:
        out = out + experts.gate_up_proj_bias[expert]
    updated: torch.Tensor = experts._apply_gate(out)
    return updated


@dataclass(frozen=True)
class FileNames:
    """What the files of a model call its experts: the module of all, and the linears of one by part."""

    block: str
    linears: Mapping[str, str]


OWN_NAMES = {part: f"{part}_proj" for parts in PARTS.values() for part in parts}


def merged_experts(module: str, experts: Any, holder: str, names: FileNames) -> Iterator[LinearSpec]:
    """The linears of a packable experts module as cuts of the 3-D tensors holder.gate_up_proj and holder.down_proj."""
    count, shapes = expert_shapes(experts)
    rows, cols = shapes[GATE_UP]
    half = rows // 2
    cuts = {"gate": (0, half, 1), "up": (half, rows, 1)} if experts.is_concatenated else {}
    cuts = cuts or {"gate": (0, rows, 2), "up": (1, rows, 2)}
    cuts["down"] = (0, shapes[DOWN][0], 1)
    for index in range(count):
        for leaf, parts in PARTS.items():
            tensor = f"{holder}.{PARAMETERS[leaf]}"
            for part in parts:
                cut = Cut(index, bool(experts.is_transposed), *cuts[part])
                place = ExpertPart(names.block, module, index, count, part, cut)
                n, k = (half, cols) if part != "down" else shapes[DOWN]
                bias = f"{tensor}_bias" if experts.has_bias else None
                yield LinearSpec(f"{names.block}.{index}.{names.linears[part]}", n, k, tensor, bias, expert=place)


def model_experts(model: Any) -> Iterator[LinearSpec]:
    """The linears of all packable experts of a model in memory, under the names that its files have for them."""
    for name, experts in experts_modules(model).items():
        if why_not_packable(experts) is None:
            yield from merged_experts(name, experts, name, _file_names(model, name))


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
    for leaf, key in PARAMETERS.items():
        saved, pattern = rename_source_key(f"{module}.{key}", renamings, converters, reverse=True)
        apart = EXPERT_WEIGHT.fullmatch(saved.replace(".*.", ".0."))
        if pattern is None or apart is None:
            return FileNames(saved.removesuffix(f".{key}") if pattern is None else module, OWN_NAMES)
        block = apart[1]
        for part, target in zip(PARTS[leaf], by_pattern[pattern].target_patterns, strict=False):
            linears[part] = target.split(".")[-2]
    return FileNames(block, linears)


def map_experts(
    path: Path, model: Any, tensors: Mapping[str, StoredTensor]
) -> tuple[tuple[LinearSpec, ...], dict[str, LeftExperts]]:
    """(the linears of all experts, module by module; parameters whose experts cannot be packed).

    Raises CheckpointError: an expert that no file holds, a shape or dtype that does not fit the model.
    """
    modules = experts_modules(model)
    if not modules:
        return (), {}
    sources = _sources(model, modules, tensors)
    specs: list[LinearSpec] = []
    left: dict[str, LeftExperts] = {}
    for name, experts in modules.items():
        reason = why_not_packable(experts)
        if reason is None:
            found = {leaf: sources.get(f"{name}.{key}", []) for leaf, key in PARAMETERS.items()}
            reason = _form(experts, found)
            if reason is None and found[GATE_UP][0].operations is None:
                specs += _merged(name, experts, found, tensors)
            elif reason is None:
                specs += _separate(path, name, experts, found)
        if reason is not None:
            for key, parameter in experts.named_parameters():
                stored = frozenset(source.tensor.name for source in sources.get(f"{name}.{key}", []))
                left[f"{name}.{key}"] = LeftExperts(reason, parameter.numel(), stored)
    return tuple(specs), left


def _sources(
    model: Any, modules: Mapping[str, nn.Module], tensors: Mapping[str, StoredTensor]
) -> dict[str, list[Source]]:
    """Parameter of an experts module -> the stored tensors that transformers makes it from."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    targets = {f"{name}.{key}" for name, module in modules.items() for key, _ in module.named_parameters()}
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    out: dict[str, list[Source]] = {}
    for name, tensor in tensors.items():
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in targets:
            continue
        source = Source(tensor)
        if pattern is not None:
            converter = by_pattern[pattern]
            operations = tuple((type(op).__name__, getattr(op, "dim", None)) for op in converter.operations)
            source = Source(tensor, converter.source_patterns.index(pattern), operations)
        out.setdefault(target, []).append(source)
    return out


STACK, JOIN = ("MergeModulelist", 0), ("Concatenate", 1)
SEPARATE = {GATE_UP: (STACK, JOIN), DOWN: (STACK,)}


def _form(experts: Any, found: Mapping[str, list[Source]]) -> str | None:
    """None when all experts are stored merged or all one by one, else the reason why they cannot be read."""
    if not all(found.values()):
        return "its experts come from no stored tensor, or from one that transformers cannot place"
    forms = {leaf: {source.operations for source in sources} for leaf, sources in found.items()}
    if all(form == {None} for form in forms.values()):
        return None
    plain = not experts.is_transposed and experts.is_concatenated and not experts.has_bias
    if plain and all(forms[leaf] == {SEPARATE[leaf]} for leaf in forms):
        return None
    names = sorted({name for form in forms.values() for steps in form for name, _ in steps or ()})
    return f"transformers makes its experts of stored tensors in a way that is not known here ({', '.join(names)})"


def _merged(
    name: str, experts: Any, found: Mapping[str, list[Source]], tensors: Mapping[str, StoredTensor]
) -> Iterator[LinearSpec]:
    """Experts that are stored as the model holds them."""
    stored = {leaf: sources[0].tensor for leaf, sources in found.items()}
    block = stored[GATE_UP].name.removesuffix(f".{PARAMETERS[GATE_UP]}")
    for leaf, key in PARAMETERS.items():
        keys = [key, f"{key}_bias"] if experts.has_bias else [key]
        for each in keys:
            tensor = tensors.get(f"{block}.{each}")
            if tensor is None:
                raise CheckpointError(f"{stored[leaf]}: no file holds {block}.{each} beside it, which {name} needs")
            _check(tensor, tuple(getattr(experts, each).shape), f"{name}.{each}")
    yield from merged_experts(name, experts, block, FileNames(block, OWN_NAMES))


def _separate(path: Path, name: str, experts: Any, found: Mapping[str, list[Source]]) -> Iterator[LinearSpec]:
    """Experts that are stored one by one, in the order of the experts: gate, up, down of each."""
    count, shapes = expert_shapes(experts)
    shapes = {GATE_UP: (shapes[GATE_UP][0] // 2, shapes[GATE_UP][1]), DOWN: shapes[DOWN]}
    held: dict[tuple[int, str], tuple[StoredTensor, re.Match[str]]] = {}
    for leaf, sources in found.items():
        for source in sources:
            match = EXPERT_WEIGHT.fullmatch(source.tensor.name)
            if match is None or int(match[2]) >= count:
                raise CheckpointError(f"{source.tensor}: is not the weight of one of the {count} experts of {name}")
            held[int(match[2]), PARTS[leaf][source.place]] = (source.tensor, match)
    for index in range(count):
        for leaf, parts in PARTS.items():
            for part in parts:
                if (index, part) not in held:
                    raise CheckpointError(f"{path}: no file holds the {part} weight of expert {index} of {name}")
                tensor, match = held[index, part]
                _check(tensor, shapes[leaf], f"the {part} weight of expert {index} of {name}")
                place = ExpertPart(match[1], name, index, count, part)
                yield LinearSpec(tensor.name.removesuffix(".weight"), *shapes[leaf], tensor.name, expert=place)


def _check(tensor: StoredTensor, shape: tuple[int, ...], what: str) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor}: the model that config.json describes has {list(shape)} for {what}; config and weights belong "
            "to different models"
        )
    if tensor.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{tensor}: weights must be fp32, fp16 or bf16 to be packed; dequantize or convert the checkpoint first"
        )
