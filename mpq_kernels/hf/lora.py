"""LoRA adapters of peft on packed layers.

    model = mpq_kernels.load("out_dir")
    config = with_packed_layers(peft.LoraConfig(r=8, target_modules="all-linear"), model)
    model = peft.get_peft_model(model, config)         or PeftModel.from_pretrained(model, adapter, config=config)

peft knows no entry point for layers of others; each config says itself which class wraps which. The packed weight stays
as it is: gradients go through it to the adapter, and merging into it is refused.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from ..errors import UnsupportedError
from ..nn.embedding import MixedEmbedding
from ..nn.experts import GroupedLinear
from ..nn.fused import FusedLinear, FusedMember
from ..nn.linear import MixedLinear

ALL_LINEAR = "all-linear"  # peft's word, which it understands as every nn.Linear


class PackedLora(LoraLinear):
    """An adapter beside a packed linear: base(x) + scaling * B(A(dropout(x)))."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> None:
        reason = _why_not(base_layer)
        if reason is not None:
            raise UnsupportedError(f"no adapter for {type(base_layer).__name__}: {reason}")
        if config.use_dora:
            raise UnsupportedError("DoRA needs the norms of rows of the weight, which a packed layer does not give")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # of a class that is not peft's
            super().__init__(base_layer, adapter_name, config=config, **options)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises UnsupportedError."""
        raise UnsupportedError(
            "an adapter cannot be merged into a packed weight without quantizing it again: keep the adapter beside the "
            "model, or merge it into the dense model and pack that"
        )


def with_packed_layers(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The same config, which now takes the packed layers of `model` too; "all-linear" becomes their names.

    The output head is left out of "all-linear", as peft does. Experts take no adapters.
    """
    config._register_custom_module({MixedLinear: PackedLora, FusedMember: PackedLora})
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        head = model.get_output_embeddings()  # type: ignore[operator]  # a method of transformers models
        config.target_modules = [
            name
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, MixedLinear, FusedMember)) and module is not head
            if _why_not(module) is None
        ]
    return config


def _why_not(layer: nn.Module) -> str | None:
    """None when an adapter can stand beside a layer, else the reason why it cannot."""
    if isinstance(layer, GroupedLinear):
        return "its rows belong to different experts"
    if isinstance(layer, MixedEmbedding):
        return "its rows are looked up by number"
    if isinstance(layer, FusedLinear):
        return f"name the projections that it holds instead: {', '.join(m.name for m in layer.members)}"
    return None
