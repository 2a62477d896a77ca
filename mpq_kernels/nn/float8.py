"""`Float8Linear`: a drop-in for nn.Linear whose weight is stored in float8 with a scale for each row.

y[M, N] = x[M, K] @ W[N, K].T + bias        W is made dense in the dtype of x at every call
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..errors import UnsupportedError
from ..format.float8 import Float8Shape, from_float8
from .linear import mark_initialized


class Float8Linear(nn.Module):
    """Linear layer over a float8 weight. State: qweight float8_e4m3fn [N, K], scales fp32 [N], and bias.

    dtype: what `weight.dtype` reports to code that inspects it, and the dtype of the bias.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    _is_hf_initialized = True  # as MixedLinear's

    def __init__(
        self,
        shape: Float8Shape,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.in_features, self.out_features = shape.in_features, shape.out_features
        self.dtype = dtype or torch.get_default_dtype()
        for name, (kind, size) in shape.tensor_specs().items():
            self.register_buffer(name, torch.zeros(size, dtype=kind, device=device))
        empty = torch.zeros(self.out_features, dtype=self.dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))

    @classmethod
    def from_tensors(
        cls, qweight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> Float8Linear:
        """Layer over existing tensors, without a copy."""
        layer = cls(Float8Shape(*qweight.shape), bias is not None, dtype, "meta")
        layer._buffers["qweight"], layer._buffers["scales"] = qweight, scales
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., K) fp32, fp16 or bf16. Returns (..., N) in x.dtype. Gradients reach x and the bias."""
        if self.qweight.is_meta and not x.is_meta:
            raise UnsupportedError(f"x is on {x.device} and the weight on the meta device, without values: load it")
        bias = self._parameters["bias"]
        return nn.functional.linear(x, self.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W [N, K]: the product of code and scale in fp32, rounded once to dtype (fp32)."""
        return from_float8(self.qweight, self.scales, dtype or torch.float32)

    @property
    def weight(self) -> torch.Tensor:
        """Stand-in [N, K] of NaN with the dtype and device that other code looks for, as MixedLinear.weight."""
        if self.qweight.is_meta:
            return mark_initialized(torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta"))
        nan = torch.full((), float("nan"), dtype=self.dtype, device=self.qweight.device)
        return mark_initialized(nan.expand(self.out_features, self.in_features))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Float8Linear:
        # .half(), .to(bfloat16) and the like must not touch what is stored: in another dtype it is another weight.
        before = dict(self._buffers)
        target = fn(torch.zeros(0, dtype=self.dtype, device=self.qweight.device))
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        self.dtype = target.dtype
        return self

    def extra_repr(self) -> str:
        """Shape and type."""
        bias = self._parameters["bias"] is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.qweight.dtype}, bias={bias}"


def float8_modules(model: nn.Module) -> Sequence[tuple[str, Float8Linear]]:
    """(name, module) of every module of a model that owns a float8 weight."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Float8Linear)]
