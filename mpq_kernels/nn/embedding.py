"""`MixedEmbedding`: a drop-in for nn.Embedding that holds a packed weight, and what is tied to it.

    ids --mpq::embedding--> rows of W [N, K]          only the words of these rows are read

A tied head multiplies by the very same weight, so it holds no tensor of its own:

    model.embed_tokens  MixedEmbedding    owns qweight, scales, zeros
    lm_head             TiedLinear        y = x @ W.T through the embedding's weight
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from torch import nn

from ..dense.kinds import RowScale, row_scale
from ..errors import FormatError, UnsupportedError
from ..format.layout import WeightLayout
from ..format.weights import PackedWeight
from .linear import LayerOptions, MixedLinear, PackedOptions, mark_initialized

ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def multiplier(scale: RowScale, dtype: torch.dtype) -> float | torch.Tensor:
    """What rows of a dtype are multiplied by. As a tensor it is rounded to that dtype first."""
    return torch.tensor(scale.factor, dtype=dtype) if scale.rounded else scale.factor


class MixedEmbedding(MixedLinear):
    """Embedding over a packed weight. State: qweight, scales, zeros, perm (as the layout has them).

    layout: out_features rows of in_features. scale: what rows are multiplied by, as Gemma's are. padding_idx: as of
    nn.Embedding, for code that reads it: the row is looked up like any other. The options are those of MixedLinear;
    rows have the dtype `dtype`. An id outside of 0..N - 1 raises RuntimeError; on a CUDA device it stops the kernel,
    and the next call that waits for the device raises, as with torch's own embedding.
    """

    def __init__(
        self,
        layout: WeightLayout,
        padding_idx: int | None = None,
        scale: RowScale | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__(layout, **options)
        self.num_embeddings, self.embedding_dim = layout.out_features, layout.in_features
        self.padding_idx, self.scale = padding_idx, scale

    @classmethod
    def like(cls, embedding: nn.Module, layout: WeightLayout, **options: Unpack[LayerOptions]) -> MixedEmbedding:
        """One with the padding index and the factor of a dense embedding of a class in dense/kinds.py."""
        padding: Any = getattr(embedding, "padding_idx", None)
        return cls(layout, padding, row_scale(embedding), **options)

    @classmethod
    def from_rows(
        cls,
        weight: PackedWeight,
        padding_idx: int | None = None,
        scale: RowScale | None = None,
        **options: Unpack[PackedOptions],
    ) -> MixedEmbedding:
        """Embedding over existing packed tensors, without a copy."""
        layer = cls(weight.layout, padding_idx, scale, device="meta", **options)
        layer.assign(weight)
        return layer

    def forward(
        self,
        x: torch.Tensor,
        gate: torch.Tensor | None = None,
        *,
        multiply: bool = False,
        scale: RowScale | Literal["own"] | None = "own",
    ) -> torch.Tensor:
        """x: ids (...), int64 or int32. Returns rows (..., K) in `dtype`, times the factor.

        The keywords are for modules that are tied to this one: `multiply` gives x @ W.T of x (..., K), `scale` is the
        factor of another embedding.
        """
        if multiply:
            return super().forward(x, gate)
        if gate is not None or x.is_floating_point():
            raise FormatError(f"ids must be integers, not {x.dtype}: the rows of an embedding are looked up by number")
        rows, factor = self.rows(x), self.scale if scale == "own" else scale
        return rows if factor is None else rows * multiplier(factor, rows.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows (..., K) of `dequantize(dtype)` for ids (...), bit for bit."""
        buffers = self._buffers
        if buffers["qweight"].device != self._device:  # type: ignore[union-attr]
            self._bind()
        if self._backend_name == "none" and ids.device.type != "meta":
            raise UnsupportedError(
                f"ids are on {ids.device} and the packed weight on the meta device, without values: load the weight; "
                "where it is offloaded, call the layer itself and not its forward, so that hooks bring it"
            )
        weight = (buffers["qweight"], buffers["scales"], buffers["zeros"], buffers["perm"])
        made = self.dtype if self.dtype in ROW_DTYPES else torch.float32
        rows: torch.Tensor = self._embedding(ids, *weight, self._segments, self.out_features, self.in_features, made)
        return rows.to(self.dtype)

    def extra_repr(self) -> str:
        """Rows and what MixedLinear says of the weight."""
        scale = "" if self.scale is None else f", scale={self.scale.factor:g}"
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}{scale}, {super().extra_repr()}"


class _Tied(nn.Module):
    """A module that uses the packed weight of an embedding. Stands where the dense one stood."""

    _is_hf_initialized = True  # as MixedLinear's

    def __init__(self, owner: MixedEmbedding) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it is not registered as a child a second time

    @property
    def owner(self) -> MixedEmbedding:
        """The embedding that owns the tensors."""
        return self._owner[0]

    @property
    def packed(self) -> PackedWeight:
        """The packed weight."""
        return self.owner.packed

    @property
    def weight(self) -> torch.Tensor:
        """Stand-in [N, K], as MixedLinear.weight."""
        return self.owner.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W [N, K], as MixedLinear.dequantize."""
        return self.owner.dequantize(dtype)


class TiedLinear(_Tied):
    """An output head over the packed weight of the input embedding. State: its bias, if it has one."""

    def __init__(self, owner: MixedEmbedding, linear: nn.Module) -> None:
        super().__init__(owner)
        self.in_features, self.out_features = owner.in_features, owner.out_features
        bias = linear._parameters.get("bias")
        self.register_parameter("bias", None if bias is None else mark_initialized(bias))  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., K) fp32, fp16 or bf16. Returns (..., N) in x.dtype.

        The embedding is called as a module, so that hooks of others, such as those that bring offloaded tensors, run.
        """
        y: torch.Tensor = self.owner(x, multiply=True)
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Shape."""
        return f"in_features={self.in_features}, out_features={self.out_features}, the weight of the input embedding"


class TiedEmbedding(_Tied):
    """An embedding of the same rows as another: those of a second stack of blocks. Has no state of its own."""

    def __init__(self, owner: MixedEmbedding, embedding: nn.Module) -> None:
        super().__init__(owner)
        self.num_embeddings, self.embedding_dim = owner.num_embeddings, owner.embedding_dim
        self.padding_idx: Any = getattr(embedding, "padding_idx", None)
        self.scale = row_scale(embedding)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (...), int64 or int32. Returns rows (..., K), times the factor of this embedding."""
        y: torch.Tensor = self.owner(ids, scale=self.scale)
        return y
