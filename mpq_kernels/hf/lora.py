"""LoRA on packed layers for a config that is handed to peft's LoraModel itself, which goes past peft's registry.

`peft.get_peft_model`, `PeftModel.from_pretrained` and `model.add_adapter` need nothing of this: adapters.py.
"""

from __future__ import annotations

from peft import LoraConfig
from torch import nn

from ..nn.fused import FusedMember
from ..nn.linear import MixedLinear
from .adapter_layers import PackedLora
from .adapters import asks_for_all, spell_out_all_linear


def with_packed_layers(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The same config, which now takes the packed layers of `model` too; "all-linear" becomes their names.

    The output head is left out of "all-linear", as peft does; experts are left to peft.get_peft_model.
    """
    config._register_custom_module({MixedLinear: PackedLora, FusedMember: PackedLora})
    if asks_for_all(config):
        spell_out_all_linear(config, model)
    return config
