"""Put packed layers where a model's nn.Linear modules and experts stand: from a plan, or empty for a loader to fill."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from torch import nn

from ..dense.experts import experts_modules, why_not_packable
from ..dense.kinds import is_linear
from ..dense.linears import DOWN, GATE_UP, PARTS
from ..dense.names import list_packable
from ..errors import FormatError
from ..format.float8 import to_float8
from ..format.weights import QuantizedWeight
from ..format.words import pack_weight
from ..plan.plan import Plan
from ..plan.resolve import ResolvedWeight, resolve
from ..progress import Progress
from ..quantize import check_weight, quantize_weight, require_no_calibration
from .embedding import MixedEmbedding, TiedEmbedding, TiedLinear
from .experts import GroupedLinear, PackedExperts
from .float8 import Float8Linear
from .fused import FusedLinear, FusedMember
from .linear import MixedLinear, PackedOptions
from .mlp import fuse_gates

# Linears that are not called: their owner multiplies by their `weight`, or hands it to a kernel, some in training only.
# Type of the owner -> their names.
READ_WEIGHTS = {
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "LongcatFlashTopkRouter": ("classifier",),
    "Mamba2Mixer": ("out_proj",),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "MobileBertLMPredictionHead": ("decoder", "dense"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
}


@dataclass
class ReplaceReport:
    """What `replace_linears` did: module name -> description of the packed layer, or the reason why it was left."""

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def replace_linears(
    model: nn.Module,
    plan: Plan,
    quantizer: str = "hqq",
    backend: str | None = None,
    progress: Progress | None = None,
    activations: str = "exact",
) -> ReplaceReport:
    """Quantize, pack and replace the linear layers and experts of a model in memory, in place, as the plan says.

    progress: called with (done, total, name) after each packed weight. activations: "exact" or "int8", as MixedLinear.
    Raises PlanError when the plan does not fit the
    model, QuantizeError for weights with NaN or Inf and for a quantizer that needs calibration; the model is unchanged
    by an error in the plan.
    """
    require_no_calibration(quantizer)
    linears = list_packable(model)
    resolved = resolve(plan, linears)
    report = ReplaceReport(left=dict(resolved.kept))
    placed: list[str] = []
    blocks: dict[str, dict[str, GroupedLinear]] = {}
    for done, weight in enumerate(resolved.weights, start=1):
        layer = quantize_modules(model, weight, quantizer, backend=backend, activations=activations)
        if isinstance(layer, GroupedLinear) and weight.experts is not None:
            names = [member.spec.name for member in weight.members]
            parts = blocks.setdefault(weight.experts.module, {})
            parts[weight.name.rpartition(".")[2]] = layer
            if len(parts) == len(PARTS):  # the dense experts are needed until both are quantized
                place_experts(model, weight.experts.module, parts)
        elif isinstance(layer, MixedEmbedding) and weight.embedding is not None:
            names = place_embedding(model, weight.name, layer, weight.embedding.shared)
            placed += names
        else:
            names = place(model, weight.name, layer)
            placed += names
        report.replaced.update({name: f"{weight.name}: {layer.extra_repr()}" for name in names})
        if progress is not None:
            progress(done, len(resolved.weights), weight.name)
    for name, spec in resolved.floats.items():
        linear = _linear(model, name)
        dense = spec.weight_of(linear.weight.detach())
        check_weight(dense, name)
        float8 = Float8Linear.from_tensors(*to_float8(dense), linear.bias, dense.dtype)
        model.set_submodule(name, float8)
        report.replaced[name] = f"{name}: {float8.extra_repr()}"
        placed.append(name)
    untie(model, placed)
    keep_scales(model)
    fuse_gates(model)
    known = {spec.name for spec in linears if not spec.embedding} | report.left.keys()
    known |= {spec.expert.module for spec in linears if spec.expert is not None}
    experts = experts_modules(model)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if name not in known and parameter is not None and parameter.dim() > 1:
                place_name = name if key == "weight" else f"{name}.{key}"
                reason = why_not_packable(module) if name in experts else None
                report.left[place_name] = reason or f"{type(module).__name__} is not an nn.Linear"
    return report


def quantize_modules(
    model: nn.Module, weight: ResolvedWeight, quantizer: str, **options: Unpack[PackedOptions]
) -> MixedLinear:
    """Packed layer over the nn.Linear modules, or the linears of experts, that one resolved weight names."""
    if weight.experts is not None:
        return _quantize_experts(model, weight, quantizer, options)
    if weight.embedding is not None:
        return _quantize_embedding(model, weight, quantizer, options)
    linears = [_linear(model, member.spec.name) for member in weight.members]
    quantized = []
    for member, linear in zip(weight.members, linears, strict=True):
        perm = None if member.perm is None else torch.tensor(member.perm, dtype=torch.int32)
        values = member.spec.weight_of(linear.weight.detach())
        quantized.append(quantize_weight(values, member.layout, perm, quantizer, name=member.spec.name))
    packed = pack_weight(QuantizedWeight.stack(quantized)).to(linears[0].weight.device)
    options.setdefault("dtype", linears[0].weight.dtype)
    bias = stack_biases([linear.bias for linear in linears], [member.spec.out_features for member in weight.members])
    if not weight.fused:
        return MixedLinear.from_packed(packed, bias, **options)
    return FusedLinear.from_members(packed, weight.member_rows(), bias, **options)


def _quantize_experts(
    model: nn.Module, weight: ResolvedWeight, quantizer: str, options: PackedOptions
) -> GroupedLinear:
    """Packed layer over one linear of all experts of a module."""
    quantized, biases = [], []
    held = model.get_parameter(weight.members[0].spec.tensor).detach()
    for member in weight.members:
        spec = member.spec
        perm = None if member.perm is None else torch.tensor(member.perm, dtype=torch.int32)
        quantized.append(quantize_weight(spec.weight_of(held), member.layout, perm, quantizer, name=spec.name))
        if spec.bias_tensor is not None:
            biases.append(spec.bias_of(model.get_parameter(spec.bias_tensor).detach()))
    packed = pack_weight(QuantizedWeight.stack(quantized)).to(held.device)
    options.setdefault("dtype", held.dtype)
    bias = torch.cat(biases) if biases else None
    count = weight.experts.count if weight.experts is not None else 0
    return GroupedLinear.from_stacked(packed, count, bias, **options)


def _quantize_embedding(
    model: nn.Module, weight: ResolvedWeight, quantizer: str, options: PackedOptions
) -> MixedEmbedding:
    """Packed layer over one embedding."""
    member, held = weight.members[0], model.get_submodule(weight.name)
    perm = None if member.perm is None else torch.tensor(member.perm, dtype=torch.int32)
    values = held.get_parameter("weight").detach()
    packed = pack_weight(quantize_weight(values, member.layout, perm, quantizer, name=weight.name)).to(values.device)
    options.setdefault("dtype", values.dtype)
    layer = MixedEmbedding.like(held, member.layout, device="meta", **options)
    layer.assign(packed)
    return layer


def place_embedding(model: nn.Module, name: str, layer: MixedEmbedding, shared: Iterable[str]) -> list[str]:
    """Put a packed embedding into the model, and its users where the modules stood that share its weight. Returns the
    names of all.
    """
    for other in shared:
        held = model.get_submodule(other)
        model.set_submodule(other, TiedLinear(layer, held) if is_linear(held) else TiedEmbedding(layer, held))
    model.set_submodule(name, layer)
    return [name, *shared]


def tied_to(model: nn.Module, name: str, packed: Container[str], known: Iterable[str]) -> list[str]:
    """Modules that share the weight of an embedding: the known ones, and those that this model ties to it besides.

    packed: modules with a packed weight of their own. What a checkpoint was packed from may have had fewer: a head that
    another class of the model adds.
    """
    weight, out = f"{name}.weight", dict.fromkeys(known)
    for path, module in model.named_modules():
        lead = f"{path}." if path else ""
        for to, source in (getattr(module, "all_tied_weights_keys", None) or {}).items():
            pair = {lead + to, lead + source}
            if weight in pair:
                out.update(dict.fromkeys(other.removesuffix(".weight") for other in pair - {weight}))
    return [other for other in out if other not in packed]


def place_experts(model: nn.Module, name: str, layers: Mapping[str, GroupedLinear]) -> None:
    """Put packed experts where the model's module of experts stands, whose parameters are dropped."""
    model.set_submodule(name, PackedExperts(layers[GATE_UP], layers[DOWN], model.get_submodule(name)))


def _linear(model: nn.Module, name: str) -> Any:
    module = model.get_submodule(name)
    if not is_linear(module):
        raise FormatError(f"{name} is a {type(module).__name__}, not a linear: was the model changed meanwhile?")
    return module


def stack_biases(biases: list[torch.Tensor | None], rows: list[int]) -> torch.Tensor | None:
    """Biases of the members above each other; zeros where one member has none; None when none has."""
    held = next((bias for bias in biases if bias is not None), None)
    if held is None:
        return None
    return torch.cat([held.new_zeros(n) if b is None else b.detach() for b, n in zip(biases, rows, strict=True)])


def place(model: nn.Module, name: str, layer: MixedLinear) -> list[str]:
    """Put a layer into the model under `name`, and the members of a fused one where they stood. Returns their names."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if not isinstance(layer, FusedLinear):
        layer.weight_is_read = leaf in READ_WEIGHTS.get(type(parent).__name__, ())
        model.set_submodule(name, layer)
        return [name]
    if leaf in parent._modules or hasattr(parent, leaf):
        raise FormatError(f"{name} exists in the model already: give the fused weight another name")
    parent.add_module(leaf, layer)
    prefix = f"{parent_name}." if parent_name else ""
    names = [prefix + member.name for member in layer.members]
    for index, member in enumerate(names):
        model.set_submodule(member, FusedMember(layer, index))
    return names


def keep_scales(model: nn.Module) -> None:
    """Stop a model from dividing weights in place when it is evaluated, and hidden states with them (RWKV).

    The quotient of both is the same without; it keeps fp16 from overflowing in models of many blocks.
    """
    for module in model.modules():
        if hasattr(module, "layers_are_rescaled"):
            module.config.rescale_every = 0  # type: ignore[union-attr]  # of a transformers model


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Tell a transformers model that these modules no longer share weight and bias (a packed output head).

    tie_weights() otherwise works out again from the config what is tied, and would put the embedding into the head.
    """
    weights = {f"{name}.{key}" for name in names for key in ("weight", "bias")}
    for path, module in model.named_modules():
        tied = getattr(module, "all_tied_weights_keys", None)
        if not tied:
            continue
        lead = f"{path}." if path else ""
        left = {to: source for to, source in tied.items() if weights.isdisjoint((lead + to, lead + source))}
        if len(left) != len(tied):
            # Of this model alone: the second is an attribute of its class, with every name and pattern.
            module.all_tied_weights_keys, module._tied_weights_keys = left, dict(left)
