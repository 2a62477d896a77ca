"""LoRA on packed layers for a config that is handed to peft's LoraModel itself, which goes past peft's registry.

`peft.get_peft_model`, `PeftModel.from_pretrained` and `model.add_adapter` need nothing of this: adapters.py.
"""

from __future__ import annotations

from peft import LoraConfig
from torch import nn

from ..nn.fused import FusedMember
from ..nn.linear import MixedLinear
from .adapters import PackedLora, spell_out_all_linear


def with_packed_layers(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The same config, which now takes the packed layers of `model` too; "all-linear" becomes their names.

    The output head is left out of "all-linear", as peft does. Experts take no adapters.
    """
    config._register_custom_module({MixedLinear: PackedLora, FusedMember: PackedLora})
    spell_out_all_linear(config, model)
    return config
