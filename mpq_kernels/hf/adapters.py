"""Adapters of peft on packed layers: LoRA (of experts too), IA3, OFT.

    model = mpq_kernels.load("out_dir")
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))

peft asks each layer whether it is an nn.Linear and has no place where another class could say what it is. It does have
a registry of its methods, name -> class that adapts a model, and that is where this file steps in: a subclass of peft's
own class takes the packed layers and leaves all others to peft. register.py imports this file when peft is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftType, TaskType
from peft.tuners.ia3 import IA3Model
from peft.tuners.lora import LoraModel
from peft.tuners.oft import OFTModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from ..dense.experts import parameters_of
from ..errors import UnsupportedError
from ..nn.embedding import MixedEmbedding, TiedEmbedding, TiedLinear
from ..nn.experts import GroupedLinear, PackedExperts
from ..nn.float8 import Float8Linear
from ..nn.fused import FusedLinear, FusedMember
from ..nn.linear import MixedLinear
from .adapter_layers import NO_MERGE, PackedAdapter, PackedExpertsLora, PackedIA3, PackedLora, PackedOFT

# Linears as a model calls them, whose subclasses may be something else: _why_no_adapters.
LINEARS = (MixedLinear, FusedMember, Float8Linear, TiedLinear)
ALL_LINEAR = "all-linear"  # peft's word, which it understands as every nn.Linear


class PackedTuner:
    """What is the same for every method; comes before peft's class that adapts a model."""

    layer_class: type[PackedAdapter]
    model: nn.Module
    peft_config: dict[str, Any]
    _all_linear = False  # whether the config of the adapter that is being put in place asks for all linears

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **options: Any) -> None:
        """As peft's, with "all-linear" for packed layers too."""
        self._all_linear = asks_for_all(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **options)  # type: ignore[misc]

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if asks_for_all(peft_config):
            spell_out_all_linear(peft_config, model)
        elif self._all_linear:
            # peft has put names in its place already, to name experts as parameters. Those know of no packed layer.
            packed = {name for name, layer in _linears(model) if not isinstance(layer, nn.Linear)}
            peft_config.target_modules = {*peft_config.target_modules, *packed}
        super()._prepare_model(peft_config, model)  # type: ignore[misc]

    def _create_new_module(self, config: PeftConfig, adapter_name: str, target: nn.Module, **options: Any) -> Any:
        if not is_packed(target):
            return super()._create_new_module(config, adapter_name, target, **options)  # type: ignore[misc]
        return self._adapter(target, options)(target, adapter_name, config=config, **options)

    def _adapter(self, target: nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
        base = _base(target)
        reason = _why_no_adapters(base)
        if reason is not None:
            raise UnsupportedError(f"no adapter for {type(base).__name__}: {reason}")
        return self.layer_class

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if is_packed(new_module):
            # peft would also put the adapter where the layer's first parameter is, or its `weight` into a layer that
            # gets rid of its adapter; adapters come to their device by themselves.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)  # type: ignore[misc]

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()  # type: ignore[misc]
        # Before the first layer is merged: a model with some adapters merged would be neither of the two.
        if any(isinstance(module, PackedAdapter) for module in self.model.modules()):
            raise UnsupportedError(NO_MERGE)


class PackedLoraModel(PackedTuner, LoraModel):
    """LoRA on a model with packed layers. What LoraConfig calls the parameters of experts are packed experts here."""

    layer_class = PackedLora

    def _adapter(self, target: nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
        return PackedExpertsLora if options.get("parameter_name") else super()._adapter(target, options)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        found = []
        for place, name in list(_expert_parameters(model)):
            key = f"{place}.{name}"
            if not any(key == wanted or key.endswith(f".{wanted}") for wanted in peft_config.target_parameters):
                continue
            parent, _, leaf = place.rpartition(".")
            target = _wrapper_of(model.get_submodule(place), name)
            with _empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(
                    peft_config,
                    adapter_name,
                    target,
                    leaf,
                    model.get_submodule(parent),
                    current_key=key,
                    parameter_name=name,
                )
            found.append(key)
        others: list[str] = super()._inject_parameters(
            peft_config=peft_config, model=model, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
        )
        return found + others


class PackedIA3Model(PackedTuner, IA3Model):
    """IA3 on a model with packed layers."""

    layer_class = PackedIA3


class PackedOFTModel(PackedTuner, OFTModel):
    """OFT on a model with packed layers."""

    layer_class = PackedOFT


# (method, peft's class, ours)
TUNERS = (
    (PeftType.LORA, LoraModel, PackedLoraModel),
    (PeftType.IA3, IA3Model, PackedIA3Model),
    (PeftType.OFT, OFTModel, PackedOFTModel),
)


def register() -> None:
    """Let peft's registry lead to the classes above; harmless when repeated."""
    for method, plain, packed in TUNERS:
        # Only where it leads to peft's own class: whoever has put another one there knows why.
        if PEFT_TYPE_TO_TUNER_MAPPING.get(method) is plain:
            PEFT_TYPE_TO_TUNER_MAPPING[method] = packed


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer, or what stands under its adapters, is packed."""
    return isinstance(_base(layer), (*LINEARS, TiedEmbedding, PackedExperts))


def spell_out_all_linear(config: Any, model: nn.Module) -> None:
    """Put the names of all linears, packed ones too, in place of "all-linear" in a config of peft's."""
    heads = _heads(config, model)
    config.target_modules = {name for name, layer in _linears(model) if all(layer is not head for head in heads)}


def asks_for_all(config: Any) -> bool:
    """Whether a config of peft's says "all-linear"."""
    targets = getattr(config, "target_modules", None)
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def _base(layer: nn.Module) -> nn.Module:
    base: nn.Module = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return base


def _why_no_adapters(layer: nn.Module) -> str | None:
    """None when an adapter can stand beside a packed layer, else the reason why it cannot."""
    if isinstance(layer, (GroupedLinear, PackedExperts)):
        return "its rows belong to different experts, to which only LoRA comes, by target_parameters as in peft"
    if isinstance(layer, (MixedEmbedding, TiedEmbedding)):
        return "its rows are looked up by number"
    if isinstance(layer, FusedLinear):
        return f"name the projections that it holds instead: {', '.join(m.name for m in layer.members)}"
    if getattr(layer, "weight_is_read", False):
        return "the model multiplies by its weight and does not call it, so that the adapter would do nothing"
    return None


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every linear that can have an adapter, or has one: then the module is the adapter."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        base = _base(module)
        if isinstance(base, (nn.Linear, *LINEARS)) and _why_no_adapters(base) is None:
            yield name, module


def _heads(config: Any, model: nn.Module) -> list[nn.Module]:
    """The layers that peft leaves out of "all-linear"."""
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if head is not None:
        return [head]
    if config.task_type != TaskType.SEQ_CLS:
        return []
    return [getattr(model, name) for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)]


def _expert_parameters(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name of a module of packed experts, name of a parameter that it stands for), whatever adapters are around it."""
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            for parameter in parameters_of(module.family).values():
                yield name.replace(".base_layer", ""), parameter


def _wrapper_of(module: nn.Module, parameter: str) -> nn.Module:
    """The adapter around experts that another adapter of the same parameter joins, else the outermost of all."""
    outermost = module
    while isinstance(module, PackedExpertsLora):
        if module.parameter_name == parameter:
            return module
        module = module.base_layer
    return outermost


def _empty_weights() -> Any:
    from accelerate import init_empty_weights  # peft's own requirement

    return init_empty_weights()


register()
