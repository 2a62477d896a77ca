"""The transformers side: after `import mpq_kernels`, `from_pretrained` and `save_pretrained` work on packed models.

transformers builds the model on the meta device, asks the quantizer to change it, and then fills tensors by name. So
the packed modules are put in place first, with the very tensors that the checkpoint stores; nothing is converted.
transformers only warns about a packed tensor that is missing, and may not see that one is misshapen; here both are
errors, found in the file headers before anything is allocated.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.config import QUANT_METHOD, PackedModule, PackingConfig
from ..checkpoint.packed import validate_tensors
from ..dense.experts import experts_modules
from ..dense.kinds import is_linear, linear_shape
from ..dense.linears import DOWN, GATE_UP
from ..errors import CheckpointError, UnsupportedError
from ..files.shards import TensorFiles
from ..format.weights import PackedWeight
from ..nn.experts import GroupedLinear, why_not_fitting
from ..nn.fused import FusedLinear
from ..nn.linear import MixedLinear, packed_modules
from ..nn.mlp import fuse_gates
from ..nn.replace import place, place_experts, untie
from .fit import fit_names

logger = logging.getLogger(__name__)


class MPQConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed model, as it stands in config.json (docs/format.md, section 6)."""

    def __init__(self, **data: Any) -> None:
        # Unchecked, because transformers also builds it only to print a config; `packing` checks.
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers lists only its own methods
        for key, value in data.items():
            setattr(self, key, value)

    def packing(self) -> PackingConfig:
        """The checked form. Raises CheckpointError."""
        return PackingConfig.from_dict(self.to_dict())


class MPQQuantizer(HfQuantizer):
    """Puts packed modules into a model that transformers is about to load."""

    quantization_config: MPQConfig
    _files: TensorFiles  # these two only while a model loads: its tensors, and name in the model -> name in the files
    _stored: dict[str, str]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work before a model is built."""
        if not self.pre_quantized:
            raise UnsupportedError(
                "a dense model is not packed while it loads: use mpq_kernels.pack, then load the result"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        packing = self.quantization_config.packing()
        files = kwargs.get("checkpoint_files")
        if not files:
            raise CheckpointError("a packed model loads from safetensors files; transformers found none")
        self._files = validate_tensors(packing.modules, files)
        fitted, self._stored = fit_names(packing, model)
        if fitted is not packing:
            self.quantization_config = MPQConfig(**fitted.to_dict())  # what save_pretrained writes of this model
        left = sorted(set(packing.modules) - set(self._stored.values()))
        if left:
            logger.warning("a %s has no place for these packed modules: %s", type(model).__name__, ", ".join(left))
        install_modules(model, fitted, kwargs.get("dtype"))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, module in packed_modules(model):
            held = [t for t in (module.qweight, module.scales, module.zeros, module.perm) if t is not None]
            if not any(tensor.is_meta for tensor in held):
                module.packed.check_values()
            elif hasattr(module, "_hf_hook"):
                self._check_offloaded(name, module)
            else:
                raise CheckpointError(f"{name}: a packed tensor was not loaded; download or pack the model again")
            module.rebind()
        del self._files, self._stored
        return model

    def _check_offloaded(self, name: str, module: MixedLinear) -> None:
        """The values of a module whose tensors accelerate's hooks bring at each call, where they lie: in the files."""
        names = {key: f"{self._stored[name]}.{key}" for key in module.layout.tensor_specs()}
        tensors = {key: self._files.read(stored) for key, stored in names.items()}
        PackedWeight(module.layout, **tensors).check_values()
        for stored in names.values():
            self._files.release(stored)

    def is_serializable(self) -> bool:
        """save_pretrained writes the packed tensors back as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients reach the inputs of packed layers, so adapters can be trained on top of them."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The operators have fakes and no data-dependent shapes: generate may compile."""
        return True


def install_modules(model: nn.Module, packing: PackingConfig, dtype: torch.dtype | None) -> None:
    """Put empty packed modules, on the meta device, where the model's linears and experts stand.

    Raises CheckpointError when the model has no such linear, or one of another shape: a plan for another model.
    """
    modules = dict(model.named_modules())
    blocks = _blocks(packing)
    for module in packing.modules.values():
        if module.experts is None:
            _check_fits(module, modules)
    for name, parts in blocks.items():
        _check_experts_fit(name, parts, modules)
    placed: list[str] = []
    compute = dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()
    for name, module in packing.modules.items():
        layer: MixedLinear
        if module.experts is not None:
            continue
        if module.members is None:
            layer = MixedLinear(module.layout, module.bias, dtype=compute, device="meta")
        else:
            layer = FusedLinear(module.layout, module.members, module.bias, dtype=compute, device="meta")
        placed += place(model, name, layer)
    untie(model, placed)
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


def _check_fits(module: PackedModule, modules: dict[str, nn.Module]) -> None:
    rows = [module.layout.out_features] if module.members is None else [m.n1 - m.n0 for m in module.members]
    biases = []
    for name, n in zip(module.replaced(), rows, strict=True):
        linear = modules.get(name)
        if linear is None or not is_linear(linear):
            found = "has no such module" if linear is None else f"has a {type(linear).__name__} there"
            raise CheckpointError(
                f"{name} is packed in this checkpoint, but the model {found}: is config.json its own?"
            )
        rows_there, columns_there = linear_shape(linear)
        if (rows_there, columns_there) != (n, module.layout.in_features):
            raise CheckpointError(
                f"{name} is packed as {n} x {module.layout.in_features}, the model wants {rows_there} x "
                f"{columns_there}: is config.json its own?"
            )
        biases.append(linear.bias is not None)
    if any(biases) != module.bias:
        raise CheckpointError(
            f"{module.name}: stored {'with' if module.bias else 'without'} a bias, unlike the model's"
        )


def register() -> None:
    """Make the quantization method known to transformers; harmless when repeated."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(MPQConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(MPQQuantizer)


register()
