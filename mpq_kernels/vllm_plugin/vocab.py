"""Packed embeddings and output heads in vLLM, cut along the vocabulary; a tied head uses the embedding's own weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from ..checkpoint.config import Float8Module, PackedModule
from ..checkpoint.packed import GUARD_SHAPE
from ..errors import CheckpointError
from ..format.float8 import from_float8
from .launches import PACKED, Launches, place
from .sources import Source

logger = init_logger(f"vllm.{__name__}")


class MPQVocabMethod(QuantizeMethodBase):
    """Rows of a packed table by number, and products with them.

    module: None for a layer that is tied to another one.
    """

    def __init__(self, prefix: str, module: PackedModule | Float8Module | None) -> None:
        self.prefix, self.module = prefix, module
        self.source: Source | None = None
        self.launches = Launches(())
        self.owner: tuple[Any, MPQVocabMethod] | None = None

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
        """Say which rows this rank keeps, and put empty parameters where the loader looks for their names."""
        self.dtype, self.width = params_dtype, output_partition_sizes[0]
        self.device = torch.get_default_device()
        if self.module is None:
            return
        shape = self.module.layout if isinstance(self.module, PackedModule) else self.module.shape
        if (shape.out_features, shape.in_features) != (layer.org_vocab_size, input_size) or layer.num_added_embeddings:
            raise CheckpointError(
                f"{self.prefix} is packed as {shape.out_features} x {shape.in_features}; vLLM wants "
                f"{layer.org_vocab_size} x {input_size} and {layer.num_added_embeddings} added rows"
            )
        first = layer.shard_indices.org_vocab_start_index
        last = layer.shard_indices.org_vocab_end_index
        # A rank whose share is padding alone holds the last row: nobody asks for it.
        self.valid = last - first
        rows = (first, last) if self.valid else (shape.out_features - 1, shape.out_features)
        self.source = Source(self.prefix, self.module, [rows])
        says = self.source.widened()
        if says is not None:
            logger.info("mpq: %s on rank %d: %s", self.prefix, layer.tp_rank, says)
        for name in (*PACKED, "weight"):
            empty = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            empty.weight_loader = self._loader(name)  # type: ignore[attr-defined]
            layer.register_parameter(name, empty)

    def _loader(self, key: str) -> Callable[..., None]:
        def load(param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
            if key == "weight" and tuple(loaded_weight.shape) == GUARD_SHAPE:
                return
            if self.source is None or key == "weight":
                raise CheckpointError(f"{self.prefix}.{key} has no place in what config.json says")
            self.source.take(key, loaded_weight, self.device)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Choose the kernels."""
        if self.source is not None:
            self.source.check_loaded()
            self.skip = self.source.kept[0].skip
            self.launches = place(layer, self.source.kept)
            self.source = None
        # vLLM's adapters look at its dtype and device; one element in memory, NaN for whoever computes with it.
        nan = torch.full((), float("nan"), dtype=self.dtype, device=self.device)
        layer.weight = nan.expand(self.width, layer.embedding_dim)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Multiply by the embedding's weight from now on, unless the files have one for this layer."""
        if self.module is not None:
            return layer
        method = embed_tokens.quant_method
        if not isinstance(method, MPQVocabMethod):
            raise CheckpointError(f"{self.prefix} shares a packed weight, and vLLM ties it to one that is not packed")
        self.owner = (embed_tokens, method)
        return layer

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., K) -> logits (..., rows of this rank, with vLLM's padding, which is 0)."""
        if self.owner is not None:
            return self.owner[1].apply(self.owner[0], x, bias)
        y = self.launches.run(layer, x, None)[..., : self.valid]
        if self.valid != self.width:
            y = nn.functional.pad(y, (0, self.width - self.valid))
        return y if bias is None else y + bias

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """ids (...), counted from this rank's first row -> rows (..., K). Those of other ranks come as 0."""
        launch = self.launches.each[0]
        if launch.embedding is None or launch.shape is None:
            codes, scales = (layer._parameters[launch.names[key]] for key in ("qweight", "scales"))
            assert codes is not None and scales is not None
            ids = input_.reshape(-1)
            rows = from_float8(codes.view(torch.uint8)[ids].view(codes.dtype), scales[ids], self.dtype)
            return rows.view(*input_.shape, -1)
        return launch.embedding(input_ + self.skip, *launch.packed(layer), *launch.shape, self.dtype)
