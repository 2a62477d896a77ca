"""The quantization method of packed folders in vLLM: which of our methods serves which of its layers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from ..checkpoint.config import QUANT_METHOD, Float8Module, PackedModule, PackingConfig
from ..errors import CheckpointError
from .experts import MPQExpertsMethod
from .linear import MPQLinearMethod
from .vocab import MPQVocabMethod

# What vLLM merges where a model's own table does not say so.
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
QKV = ("q", "k", "v")
KEYS = "qweight|scales|zeros|perm|bias"


class MPQConfig(QuantizationConfig):
    """A checked `quantization_config` and the methods that it asks for."""

    def __init__(self, packing: PackingConfig) -> None:
        super().__init__()
        self.packing = packing
        self.packed_modules_mapping: dict[str, list[str]] = {}
        self._index()

    def _index(self) -> None:
        """By the names of vLLM's model: what is packed, what stands for which dense module, and the experts."""
        modules = self.packing.modules
        self.owners: dict[str, PackedModule | Float8Module] = {**self.packing.floats}
        self.experts: dict[str, dict[str, PackedModule]] = {}
        self.shared: dict[str, str] = {}
        for name, module in modules.items():
            if module.experts is not None:
                # vLLM's layer is called as in the files, which may not be as in transformers (Mixtral).
                block, _, leaf = name.rpartition(".")
                for place in {block, module.experts.module}:
                    self.experts.setdefault(place, {})[leaf] = module
                continue
            for dense in module.replaced():
                self.owners[dense] = module
            for tied in module.shared:
                self.shared[tied] = name

    def get_name(self) -> str:
        """As in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of x that the operators take."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of CUDA devices: what the kernels are built for begins there."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MPQConfig:
        """Of a quantization_config. Raises CheckpointError."""
        return cls(PackingConfig.from_dict(dict(config)))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Take vLLM's names of the modules in place of those in the files."""

        def renamed(name: str) -> str:
            return hf_to_vllm_mapper._map_name(name) or name

        modules = {}
        for name, module in self.packing.modules.items():
            experts, embedding = module.experts, module.embedding
            if experts is not None:
                experts = replace(experts, module=renamed(experts.module))
            if embedding is not None:
                embedding = replace(embedding, shared=tuple(map(renamed, embedding.shared)))
            new = renamed(name)
            modules[new] = replace(module, name=new, experts=experts, embedding=embedding)
        floats = {renamed(name): replace(m, name=renamed(name)) for name, m in self.packing.floats.items()}
        self.packing = replace(self.packing, modules=modules, floats=floats)
        self._index()

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Renamings of stored tensors: fused weights get the name of vLLM's own merged layer."""
        names: dict[re.Pattern[str], str | None] = {}
        for module in self.packing.modules.values():
            if module.members is None or module.experts is not None:
                continue
            leaf = module.name.rpartition(".")[2]
            target = self._merged_name([member.name for member in module.members])
            if target is not None and target != leaf:
                names[re.compile(rf"(^|\.){re.escape(leaf)}\.({KEYS})$")] = rf"\1{target}.\2"
        return WeightsMapper(orig_to_new_regex=names)

    def _merged_name(self, members: list[str]) -> str | None:
        """What vLLM calls the layer that has these members, if it has one."""
        tables = {**MERGED, **self.packed_modules_mapping}
        return next((name for name, parts in tables.items() if list(parts) == members), None)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer; vLLM's own for one that is not packed. Raises CheckpointError."""
        if isinstance(layer, RoutedExperts):
            parts = self.experts.get(prefix)
            if parts is None and prefix.endswith(".routed_experts"):
                parts = self.experts.get(prefix.removesuffix(".routed_experts"))
            return None if parts is None else MPQExpertsMethod(layer.moe_config, parts)
        if isinstance(layer, VocabParallelEmbedding):
            module = self.owners.get(prefix)
            if module is None and prefix not in self.shared:
                return UnquantizedEmbeddingMethod()
            return MPQVocabMethod(prefix, module)
        if not isinstance(layer, LinearBase):
            return None
        leaf = prefix.rpartition(".")[2]
        lead = prefix[: len(prefix) - len(leaf)]
        members = [prefix]
        if prefix not in self.owners:
            members = [lead + part for part in {**MERGED, **self.packed_modules_mapping}.get(leaf, [leaf])]
        found = [self.owners.get(name) for name in members]
        if not any(found):
            return UnquantizedLinearMethod()
        keys: list[Any] = [None]
        if len(members) > 1:
            keys = list(QKV) if isinstance(layer, QKVParallelLinear) else list(range(len(members)))
        if len(keys) != len(members):
            raise CheckpointError(f"{prefix}: vLLM merges {', '.join(members)} here, which are not q, k and v")
        return MPQLinearMethod(prefix, list(zip(keys, members, found, strict=True)))
