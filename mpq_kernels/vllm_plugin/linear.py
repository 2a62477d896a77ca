"""Packed linears in vLLM, alone or merged: q, k and v, gate and up, whatever the files call them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase

from ..checkpoint.config import Float8Module, PackedModule
from ..checkpoint.packed import GUARD_SHAPE
from ..errors import CheckpointError
from .launches import PACKED, Launches, place
from .sources import Kept, Range, Source, share

logger = init_logger(f"vllm.{__name__}")  # a name below vLLM's own, whose handler prints it

Found = PackedModule | Float8Module | None
Member = tuple[Any, str, Found]  # vLLM's number of the shard, name of the dense module, what is packed for it


class MPQLinearMethod(LinearMethodBase):
    """Products of a layer over packed weights; members that are kept in 16 bits are multiplied beside them.

    members: in the order of the layer's outputs. One packed weight may stand for several of them.
    """

    def __init__(self, prefix: str, members: Sequence[Member]) -> None:
        self.prefix, self.members = prefix, list(members)
        # The key that the loader hands over with a tensor -> its source; None where a weight is fused in the files.
        self.sources: dict[Any, Source] = {}
        self.order: list[tuple[Source, int]] = []  # for each output, its source and the number of its part there
        self.launches = Launches(())

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Say what this rank keeps, and put empty parameters where the loader looks for their names."""
        rank = getattr(layer, "tp_rank", 0)
        columns = None
        if input_size_per_partition != input_size:
            columns = (rank * input_size_per_partition, (rank + 1) * input_size_per_partition)
        full = full_sizes(layer, output_partition_sizes, output_size)
        replicas = [1] * len(full)
        if hasattr(layer, "num_kv_head_replicas"):
            replicas[1:] = [layer.num_kv_head_replicas] * (len(full) - 1)
        rows = [
            share(whole, part, rank // copies)
            for whole, part, copies in zip(full, output_partition_sizes, replicas, strict=True)
        ]
        self._find_sources(full, rows, columns)
        for source in self.sources.values():
            self._check_shape(source, input_size)
            says = source.widened()
            if says is not None:
                logger.info("mpq: %s on rank %d: %s", source.name, rank, says)
        device = torch.get_default_device()
        for name in (*PACKED, "weight"):
            empty = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            empty.weight_loader = self._loader(name, device)  # type: ignore[attr-defined]
            layer.register_parameter(name, empty)

    def _find_sources(self, full: list[int], rows: list[Range], columns: Range | None) -> None:
        """One source for each module of the files, with the parts of it that are wanted."""
        members = self.members
        if len(members) == 1:
            # One weight for all outputs, whose rows follow each other.
            _, name, module = members[0]
            source = self.sources[None] = Source(name, module, offset_rows(full, rows), columns)
            self.order = [(source, number) for number in range(len(rows))]
            return
        if len(members) != len(rows):
            raise CheckpointError(f"{self.prefix}: {len(members)} members for {len(rows)} outputs")
        first = members[0][2]
        if isinstance(first, PackedModule) and first.members is not None and all(m[2] is first for m in members):
            source = self.sources[None] = Source(first.name, first, offset_rows(full, rows), columns)
            self.order = [(source, number) for number in range(len(rows))]
            return
        for (key, name, module), wanted in zip(members, rows, strict=True):
            if isinstance(module, PackedModule) and module.members is not None:
                raise CheckpointError(
                    f"{module.name} is fused of other members than vLLM merges in {self.prefix}; pack the model with "
                    "q/k/v and gate/up fused, or without `fuse`"
                )
            source = self.sources[key] = Source(name, module, [wanted], columns)
            self.order.append((source, 0))

    def _check_shape(self, source: Source, input_size: int) -> None:
        module = source.module
        if module is None:
            return
        shape = module.layout if isinstance(module, PackedModule) else module.shape
        if shape.in_features != input_size or source.wanted[-1][1] > shape.out_features:
            raise CheckpointError(
                f"{source.name} is packed as {shape.out_features} x {shape.in_features}; vLLM wants rows up to "
                f"{source.wanted[-1][1]} of {input_size} columns: is config.json the model's own?"
            )

    def _loader(self, key: str, device: torch.device) -> Callable[..., None]:
        """What the loader calls with a tensor of the files and the key of its shard."""

        def load(param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
            if key == "weight" and tuple(loaded_weight.shape) == GUARD_SHAPE:
                return
            source = self.sources.get(shard_id)
            if source is None or (key == "weight") != (source.module is None):
                raise CheckpointError(f"{self.prefix}: {key} of shard {shard_id} has no place in what config.json says")
            source.take(key, loaded_weight, device)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put what was loaded together, and choose the kernels."""
        for source in self.sources.values():
            source.check_loaded()
        kept: list[Kept] = [source.kept[number] for source, number in self.order]
        self.launches = place(layer, kept)
        self.sources, self.order = {}, []

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., K of this rank) -> (..., N of this rank)."""
        return self.launches.run(layer, x, bias)


def full_sizes(layer: Any, parts: list[int], output_size: int) -> list[int]:
    """Rows of each output over all ranks, as the files have them."""
    if len(parts) == 3 and hasattr(layer, "total_num_kv_heads"):
        heads, key_values = layer.total_num_heads, layer.total_num_kv_heads
        value_size = getattr(layer, "v_head_size", layer.head_size)
        return [heads * layer.head_size, key_values * layer.head_size, key_values * value_size]
    if len(parts) > 1:
        return list(layer.output_sizes)
    return [output_size]


def offset_rows(full: list[int], rows: list[Range]) -> list[Range]:
    """The same rows, counted from the start of a weight that has all outputs one below the other."""
    out, start = [], 0
    for whole, (n0, n1) in zip(full, rows, strict=True):
        out.append((start + n0, start + n1))
        start += whole
    return out
