"""Packed experts in vLLM. Several ranks share out whole experts, which is a cut that is always possible.

    tokens --sort by expert--> gate_up of this rank's experts --> activation --> down --> weights, added up per token

Rows for experts of other ranks are multiplied by nothing of theirs and count as 0; vLLM adds up the ranks' results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from ..backends import select
from ..checkpoint.config import PackedModule
from ..dense.linears import DOWN, GATE_UP
from ..errors import CheckpointError
from ..format.cut import stack_weights
from ..format.weights import TORCH_DTYPES, PackedWeight
from .launches import PACKED

logger = init_logger(f"vllm.{__name__}")
PARTS = (GATE_UP, DOWN)


class MPQExpertsMethod(FusedMoEMethodBase):
    """The experts of a mixture as two stacked packed weights.

    parts: GATE_UP and DOWN -> what is packed.
    """

    def __init__(self, moe: FusedMoEConfig, parts: dict[str, PackedModule]) -> None:
        super().__init__(moe)
        if set(parts) != set(PARTS):
            raise CheckpointError(
                f"{', '.join(m.name for m in parts.values())}: packed experts are {' and '.join(PARTS)}"
            )
        self.parts = parts
        self.held: dict[str, dict[str, torch.Tensor]] = {leaf: {} for leaf in PARTS}
        self.shapes: dict[str, tuple[list[int], int, int]] = {}
        self.products: dict[str, Callable[..., torch.Tensor]] = {}

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: torch.dtype, moe_parallel_config: Any
    ) -> tuple[int, int]:
        """As they are: our operators take any size."""
        return hidden_size, intermediate_size_per_partition

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Say which experts this rank keeps; their tensors come through `load_weights` of the layer."""
        config = layer.moe_config
        count = config.num_experts
        for leaf, module in self.parts.items():
            if module.experts is None or module.experts.count != count:
                raise CheckpointError(
                    f"{module.name} is not packed as {count} experts: is config.json the model's own?"
                )
            size = module.layout.in_features if leaf == GATE_UP else module.layout.out_features // count
            if size != hidden_size:
                raise CheckpointError(f"{module.name}: experts of hidden size {size}; vLLM wants {hidden_size}")
        self.device = torch.get_default_device()
        self.mine = owned_experts(layer, count)
        if len(self.mine) < count:
            logger.info("mpq: %s: this rank holds %d of %d experts, whole", layer.layer_name, len(self.mine), count)
        local = torch.full((count,), -1, dtype=torch.int64)
        local[torch.tensor(self.mine, dtype=torch.int64)] = torch.arange(len(self.mine))
        layer.register_buffer("mpq_local", local, persistent=False)
        # vLLM's loader knows the names of unpacked experts; ours come as <gate_up|down>.<tensor>.
        layer.load_weights = self._load

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        for name, tensor in weights:
            leaf, _, key = name.rpartition(".")
            module = self.parts.get(leaf)
            if module is None or f"{module.name}.{key}" not in module.tensor_names:
                raise CheckpointError(f"{name} has no place among packed experts: {self.parts[DOWN].name}")
            spec = module.layout.tensor_specs().get(key)
            if spec is not None and (tensor.dtype, tuple(tensor.shape)) != (TORCH_DTYPES[spec[0]], spec[1]):
                raise CheckpointError(f"{module.name}.{key} is {tensor.dtype} {list(tensor.shape)}, not {spec}")
            self.held[leaf][key] = tensor.detach()
            if len(self.held[leaf]) == len(module.tensor_names):
                self.held[leaf] = self._cut(leaf)
            yield f"{leaf}_{key}"

    def _cut(self, leaf: str) -> dict[str, torch.Tensor]:
        """The tensors of this rank's experts, in place of those of all."""
        module, held = self.parts[leaf], self.held[leaf]
        count = self.moe.num_experts
        rows = module.layout.out_features // count
        whole = PackedWeight(module.layout, **{key: held[key] for key in module.layout.tensor_specs()})
        whole.check_values()
        stacked = stack_weights([whole.rows(e * rows, (e + 1) * rows) for e in self.mine])
        layout = stacked.layout
        self.shapes[leaf] = (layout.segment_ints(), layout.out_features, layout.in_features)
        self.products[leaf] = select(layout, self.device.type).grouped
        tensors = {key: tensor.to(self.device, copy=True) for key, tensor in stacked.tensors().items()}
        if "bias" in held:
            tensors["bias"] = held["bias"].view(count, rows)[self.mine].reshape(-1).to(self.device, copy=True)
        return tensors

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make parameters of what was loaded."""
        for leaf in PARTS:
            if leaf not in self.shapes:
                raise CheckpointError(f"{self.parts[leaf].name}: the files lack tensors of it; pack the model again")
            for key, tensor in self.held[leaf].items():
                layer.register_parameter(f"{leaf}_{key}", nn.Parameter(tensor, requires_grad=False))
        self.held = {leaf: {} for leaf in PARTS}

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig | None:
        """What vLLM's own kernels would need: nothing, they are not used."""
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """x (tokens, hidden), weights and numbers of experts (tokens, k) -> (tokens, hidden) of this rank's experts."""
        tokens, k = topk_ids.shape
        here = layer.mpq_local[topk_ids.reshape(-1).long()]
        last = len(self.mine) - 1
        # Operators want every row to belong to an expert: the last one stands in for those of other ranks.
        expert, order = torch.sort(torch.where(here < 0, last, here), stable=True)
        bounds = torch.arange(last + 2, device=expert.device, dtype=expert.dtype)
        offsets = torch.searchsorted(expert, bounds, out_int32=True)
        rows = x[order // k]
        weights = topk_weights.float()
        if layer.apply_router_weight_on_input:
            rows = (rows.float() * weights.reshape(-1)[order, None]).to(x.dtype)
            weights = torch.ones_like(weights)
        hidden = self._activate(layer, self._product(layer, GATE_UP, rows, offsets))
        y = self._product(layer, DOWN, hidden, offsets)
        placed = torch.empty_like(y)
        placed[order] = y
        # Not times 0: what the stand-in makes of rows that are not its own may overflow.
        placed = torch.where((here >= 0).unsqueeze(1), placed, 0)
        return (placed.view(tokens, k, -1).float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def _product(self, layer: Any, leaf: str, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        held = layer._parameters
        weight = [held.get(f"{leaf}_{key}") for key in (*PACKED, "bias")]
        return self.products[leaf](rows, *weight, offsets, *self.shapes[leaf])

    def _activate(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The gate between both products: gate and up lie one after the other, whatever the family's files have."""
        kind = layer.activation
        if kind == MoEActivation.SILU and layer.swiglu_limit is None:
            half, up = hidden.chunk(2, -1)
            return nn.functional.silu(half) * up
        if kind == MoEActivation.SWIGLUOAI:
            half, up = hidden.chunk(2, -1)
            alpha = 1.702 if layer.swiglu_alpha is None else layer.swiglu_alpha
            limit = 7.0 if layer.swiglu_limit is None else layer.swiglu_limit
            half, up = half.clamp(max=limit), up.clamp(-limit, limit)
            return (up + 1) * (half * torch.sigmoid(half * alpha))
        width = hidden.shape[-1] // 2 if kind.is_gated else hidden.shape[-1]
        out = hidden.new_empty(hidden.shape[0], width)
        return apply_moe_activation(kind, out, hidden)


def owned_experts(layer: Any, count: int) -> list[int]:
    """The experts that this rank holds, in order: vLLM's own choice with expert parallelism, else equal blocks."""
    config = layer.moe_config
    if config.use_ep:
        table = layer._expert_map
        return list(range(count)) if table is None else [e for e in range(count) if int(table[e]) >= 0]
    ranks, rank = config.tp_size, config.tp_rank
    if ranks > count:
        raise CheckpointError(f"{layer.layer_name}: {count} experts for {ranks} ranks; use fewer ranks")
    return list(range(count * rank // ranks, count * (rank + 1) // ranks))
