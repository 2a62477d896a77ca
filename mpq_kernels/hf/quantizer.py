"""The transformers side: after `import mpq_kernels`, `from_pretrained` and `save_pretrained` work on packed models.

transformers builds the model on the meta device, asks the quantizer to change it, and then fills tensors by name. So
the packed modules are put in place first, with the very tensors that the checkpoint stores; nothing is converted.
transformers only warns about a packed tensor that is missing, and may not see that one is misshapen; here both are
errors, found in the file headers before anything is allocated.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.config import IMPORT_FIRST, QUANT_METHOD, WEIGHTS_KEY, Float8Module, PackedModule, PackingConfig
from ..checkpoint.packed import GUARD_SHAPE, guard_names, guards, validate_tensors
from ..dense.model import CONFIG_FILE, check_bytes
from ..errors import CheckpointError, UnsupportedError
from ..files.shards import TensorFiles
from ..format.float8 import bad_float8
from ..format.weights import PackedWeight
from ..nn.float8 import float8_modules
from ..nn.install import install_modules
from ..nn.linear import MixedLinear, packed_modules
from ..nn.naming import PackedNames, own_names, packed_names, spared_transforms
from .dequantize import dequantize_model
from .fit import fit_names
from .resize import RESIZE, guard_resizing

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
    # These only while a model loads: its tensors; name in the files -> packed module; names of tensors.
    _files: TensorFiles
    _stored: dict[str, PackedModule | Float8Module]
    _names: PackedNames
    _own: set[str]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work before a model is built."""
        if not self.pre_quantized:
            raise UnsupportedError(
                "a dense model is not packed while it loads: use mpq_kernels.pack, then load the result"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Take the words out of the config that stop a program without this package, before files are looked for.

        Nothing to do with attention: of all that transformers asks a quantizer, it is what comes early enough.
        """
        if getattr(config, WEIGHTS_KEY, None) == IMPORT_FIRST:
            delattr(config, WEIGHTS_KEY)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The same, at the place that transformers had for it until 5.19."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        packing = self.quantization_config.packing()
        files = kwargs.get("checkpoint_files")
        if not files:
            raise CheckpointError("a packed model loads from safetensors files; transformers found none")
        self._files = validate_tensors(packing.modules, files, packing.floats)
        fitted, self._stored = fit_names(packing, model)
        _expect_no_place_for(guards(packing.modules, self._files), model)
        if fitted is not packing:
            self.quantization_config = MPQConfig(**fitted.to_dict())  # what save_pretrained writes of this model
        left = sorted({*packing.modules, *packing.floats} - set(self._stored))
        if left:
            logger.warning("a %s has no place for these packed modules: %s", type(model).__name__, ", ".join(left))
        self._names = packed_names(self._stored)
        self._own = own_names(model, self._files.tensors, self._names)
        install_modules(model, fitted, kwargs.get("dtype"))
        stored = sum(tensor.entry.nbytes for tensor in self._files.tensors.values())
        check_bytes(self._files.files[0].parent / CONFIG_FILE, model, stored)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """transformers' renamings and conversions, which leave packed tensors alone."""
        return spared_transforms(weight_conversions, self._names, self._own)

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
        for name, float8 in float8_modules(model):
            if float8.qweight.is_meta and not hasattr(float8, "_hf_hook"):
                raise CheckpointError(f"{name}: a packed tensor was not loaded; download or pack the model again")
            stored = self._stored_name(name)
            there = float8.qweight, float8.scales
            if float8.qweight.is_meta:
                there = self._files.read(f"{stored}.qweight"), self._files.read(f"{stored}.scales")
            reason = bad_float8(*there)
            if reason is not None:
                raise CheckpointError(f"{name}: {reason}; pack the model again")
        guard_resizing(model)
        del self._files, self._stored, self._names, self._own
        return model

    def _check_offloaded(self, name: str, module: MixedLinear) -> None:
        """The values of a module whose tensors accelerate's hooks bring at each call, where they lie: in the files."""
        stored = self._stored_name(name)
        names = {key: f"{stored}.{key}" for key in module.layout.tensor_specs()}
        tensors = {key: self._files.read(stored) for key, stored in names.items()}
        PackedWeight(module.layout, **tensors).check_values()
        for tensor in names.values():
            self._files.release(tensor)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        """What `model.dequantize()` calls, with the dtype in config, which is a name once the model was saved."""
        model.__dict__.pop(RESIZE, None)
        made: nn.Module = dequantize_model(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return made

    def _stored_name(self, name: str) -> str:
        """What the files call a packed module of the model."""
        return next(stored for stored, placed in self._stored.items() if placed.installed == name)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any]]:
        """What save_pretrained writes: the model's tensors and, for programs without this package, a guard."""
        if getattr(model, "_hf_peft_config_loaded", False):  # adapters alone are saved
            return None, {}
        state = model.state_dict()
        name = self._guard_name(model)
        return (state if name is None else state | {name: torch.empty(GUARD_SHAPE)}), {}

    def _guard_name(self, model: Any) -> str | None:
        """Name of a guard that comes into the file as it is; None when transformers would change all of them."""
        for name in guard_names(self.quantization_config.packing().modules):
            try:
                written = revert_weight_conversion(model, {name: torch.empty(GUARD_SHAPE)})
            except Exception:  # a conversion of the family that wants a real weight, and may raise anything
                continue
            if list(written) == [name] and tuple(written[name].shape) == GUARD_SHAPE:
                return name
        return None

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


def _expect_no_place_for(names: list[str], model: Any) -> None:
    """Let transformers pass in silence over stored tensors of these names, with or without the base model's prefix."""
    lead = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    patterns = {rf"(^|\.){re.escape(name.removeprefix(lead))}$" for name in names}
    model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | patterns


def register() -> None:
    """Make the quantization method known to transformers; harmless when repeated."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(MPQConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(MPQQuantizer)


register()
