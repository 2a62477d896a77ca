"""The experts of a mixture as two stacked packed weights, each expert with its own widths.

    gate_up  rows | expert 0: gate, up | expert 1: gate, up | ...       every band may have its own width
    down     rows | expert 0           | expert 1           | ...

    tokens --sort by expert--> gate_up --> the family's gate --> down --> weights, back in the order of the tokens

Experts without a gate have their up projection in `gate_up`, and their activation in place of the gate.

`PackedExperts` stands where transformers has its module of 3-D parameters and is called in the same way. What the
family does between the two projections stays its own code: the module that was replaced is kept, without its
parameters, for its gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import nn

from ..backends.base import Product
from ..dense.experts import expert_shapes, gate, parameters_of, why_not_packable
from ..dense.linears import DOWN, GATE_UP
from ..errors import FormatError
from ..format.layout import WeightLayout, check_experts
from ..format.weights import PackedWeight
from .linear import LayerOptions, MixedLinear, PackedOptions, mark_initialized, only_shapes


class GroupedLinear(MixedLinear):
    """One linear of every expert: a packed weight of experts * N rows, for rows of x that are sorted by expert."""

    def __init__(
        self,
        layout: WeightLayout,
        experts: int,
        bias: bool = False,
        **options: Unpack[LayerOptions],
    ) -> None:
        check_experts(layout, experts)
        self._grouped: Product
        super().__init__(layout, bias, **options)
        self.experts, self.rows = experts, layout.out_features // experts

    @classmethod
    def from_stacked(
        cls,
        weight: PackedWeight,
        experts: int,
        bias: torch.Tensor | None = None,
        **options: Unpack[PackedOptions],
    ) -> GroupedLinear:
        """Layer over existing packed tensors, without a copy. bias: [experts * N] or None."""
        layer = cls(weight.layout, experts, bias is not None, device="meta", **options)
        layer.assign(weight, bias)
        return layer

    def forward(self, x: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
        """x: (T, K) fp32, fp16 or bf16, sorted by expert. offsets: int32 (experts + 1,), the first row of each, then T.

        Returns (T, N) in x.dtype; sums are kept in fp32.
        """
        if offsets is None:
            raise FormatError("the rows of x belong to different experts; offsets must say which to which")
        buffers = self._buffers
        if buffers["qweight"].device != self._device:  # type: ignore[union-attr]
            self._bind()
        weight = (buffers["qweight"], buffers["scales"], buffers["zeros"], buffers["perm"])
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            y: torch.Tensor = GroupedLinearFunction.apply(x, self.bias, offsets, self, weight)
            return y
        return self._grouped(x, *weight, self.bias, offsets, *self._shape)

    def dequantize_expert(self, expert: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W [N, K] of one expert, as MixedLinear.dequantize."""
        part = self.packed.rows(expert * self.rows, (expert + 1) * self.rows)
        return dequantize_rows(part, self._dequantize, dtype or torch.float32)

    @property
    def _shape(self) -> tuple[list[int], int, int]:
        return self._segments, self.out_features, self.in_features

    def _take_products(self, linear: Product, grouped: Product) -> None:
        super()._take_products(linear, grouped)
        self._grouped = grouped if self._backend_name != "none" else only_shapes(grouped)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_grouped"}

    def extra_repr(self) -> str:
        """As MixedLinear, with the experts."""
        return f"experts={self.experts}, {super().extra_repr()}"


def dequantize_rows(weight: PackedWeight, product: Product, dtype: torch.dtype) -> torch.Tensor:
    """W of a packed weight by a backend's `dequantize`: fp32 rounded once to dtype."""
    layout = weight.layout
    made = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    tensors = (weight.qweight, weight.scales, weight.zeros, weight.perm)
    return product(*tensors, layout.segment_ints(), layout.out_features, layout.in_features, made).to(dtype)


class GroupedLinearFunction(torch.autograd.Function):
    """Gradients with respect to x and bias through a stacked packed weight, which itself is constant."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        offsets: torch.Tensor,
        layer: GroupedLinear,
        weight: tuple[torch.Tensor | None, ...],
    ) -> torch.Tensor:
        """As `mpq::grouped_linear`."""
        # The tensors and not the layer's own at the time of the backward pass: those may be offloaded again.
        ctx.save_for_backward(offsets, *weight)
        ctx.layer, ctx.dequantize = layer, layer._dequantize
        return layer._grouped(x, *weight, bias, offsets, *layer._shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """grad_x = grad @ W of its expert, grad_bias = the sum of grad over the rows of each expert."""
        layer: GroupedLinear = ctx.layer
        offsets, *tensors = ctx.saved_tensors
        starts, weight = offsets.tolist(), PackedWeight(layer.layout, *tensors)
        grad_x = grad.new_zeros(grad.shape[0], layer.in_features) if ctx.needs_input_grad[0] else None
        grad_bias = grad.new_zeros(layer.experts, layer.rows) if ctx.needs_input_grad[1] else None
        for expert in range(layer.experts):
            rows = slice(starts[expert], starts[expert + 1])
            if rows.start == rows.stop:
                continue
            if grad_x is not None:
                part = weight.rows(expert * layer.rows, (expert + 1) * layer.rows)
                grad_x[rows] = grad[rows] @ dequantize_rows(part, ctx.dequantize, grad.dtype)
            if grad_bias is not None:
                grad_bias[expert] = grad[rows].sum(0)
        return grad_x, None if grad_bias is None else grad_bias.reshape(-1), None, None, None


class PackedExperts(nn.Module):
    """Drop-in for the experts module of a transformers model, called as experts(hidden, top_k_index, top_k_weights).

    family: the module that it replaces; its parameters are dropped. Raises FormatError for a module that is not of
    transformers' experts interface, and for weights that are not of its shapes.
    """

    _is_hf_initialized = True  # as MixedLinear's

    def __init__(self, gate_up: GroupedLinear, down: GroupedLinear, family: nn.Module) -> None:
        super().__init__()
        for leaf, layer in ((GATE_UP, gate_up), (DOWN, down)):
            reason = why_not_fitting(family, leaf, layer.experts, layer.layout, layer.bias is not None)
            if reason is not None:
                raise FormatError(reason)
        self.num_experts = gate_up.experts
        self.gate_up, self.down = gate_up, down
        for name in list(family._parameters):
            del family._parameters[name]
        # In a tuple, so that it is not registered: it has no state, and transformers would initialize its parameters.
        self._family = (family,)
        self._interleaved = family.has_gate and not family.is_concatenated
        self._some_pass = bool(getattr(family, "zero_expert_num", 0))
        # What adapters add to the products while they are active: GATE_UP or DOWN -> f(x, offsets), both as the layers
        # take them. Returns (T, N) in the order of rows of the family's own parameter.
        self.deltas: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        # _init_weights of the module around the experts may write to their parameters.
        family = self.__dict__.get("_family", (None,))[0]
        if family is not None and name in parameters_of(family).values():
            return mark_initialized(torch.empty(0, device="meta"))
        return super().__getattr__(name)

    @property
    def family(self) -> nn.Module:
        """The module that this one replaced, without its parameters."""
        return self._family[0]

    @property
    def is_transposed(self) -> bool:
        """Whether the family's own parameters are [E, K, N] and not [E, N, K]."""
        return bool(self.family.is_transposed)

    def stand_in(self, leaf: str) -> torch.Tensor:
        """The family's own parameter of GATE_UP or DOWN by shape, dtype and device, as `MixedLinear.weight`."""
        layer = self.gate_up if leaf == GATE_UP else self.down
        stacked = layer.stand_in(layer.out_features).unflatten(0, (self.num_experts, layer.rows))
        return stacked.transpose(1, 2) if self.is_transposed else stacked

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states: (tokens, hidden). top_k_index, top_k_weights: (tokens, k), experts and their weights.

        Without those, the rows are sorted by expert, equally many of each, and come back in that order.
        Returns (tokens, hidden) in the dtype of hidden_states. Experts of a token are added in fp32, in the order of
        top_k_index, so the same input gives the same bits.
        """
        if top_k_index is None or top_k_weights is None:
            each = hidden_states.shape[0] // self.num_experts
            starts = torch.arange(self.num_experts + 1, device=hidden_states.device, dtype=torch.int32)
            return self._run(hidden_states, starts * each)
        tokens, k = top_k_index.shape
        wanted = top_k_index.reshape(-1)
        # Of experts that only give back what they read, the last one stands in: their rows are replaced below.
        expert, order = torch.sort(wanted.clamp(max=self.num_experts - 1) if self._some_pass else wanted, stable=True)
        bounds = torch.arange(self.num_experts + 1, device=expert.device, dtype=expert.dtype)
        offsets = torch.searchsorted(expert, bounds, out_int32=True)
        y = self._run(hidden_states[order // k], offsets)
        placed = torch.empty_like(y)
        placed[order] = y
        if self._some_pass:
            passed = (wanted >= self.num_experts).unsqueeze(1)
            placed = torch.where(passed, hidden_states.repeat_interleave(k, dim=0), placed)
        weighted = placed.view(tokens, k, self.down.rows).float() * top_k_weights.unsqueeze(-1).float()
        return weighted.sum(1).to(hidden_states.dtype)

    def _run(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Gate, up and down of rows that are sorted by expert."""
        hidden = self.gate_up(rows, offsets)
        if self._interleaved:
            hidden = hidden.unflatten(1, (2, self.gate_up.rows // 2)).transpose(1, 2).flatten(1)
        if GATE_UP in self.deltas:
            hidden = hidden + self.deltas[GATE_UP](rows, offsets)
        hidden = gate(self.family, hidden)
        y: torch.Tensor = self.down(hidden, offsets)
        return y + self.deltas[DOWN](hidden, offsets) if DOWN in self.deltas else y


def why_not_fitting(family: nn.Module, leaf: str, experts: int, layout: WeightLayout, bias: bool) -> str | None:
    """None when a packed weight can be the `leaf` ("gate_up" or "down") of a module of experts, else why it cannot."""
    reason = why_not_packable(family)
    if reason is not None:
        return f"{type(family).__name__} cannot hold packed experts: {reason}"
    count, shapes = expert_shapes(family)
    rows, cols = shapes[leaf]
    if (experts, layout.out_features, layout.in_features) != (count, count * rows, cols):
        return (
            f"{leaf} is packed as {experts} experts, {layout.out_features} x {layout.in_features} in all; the model "
            f"wants {count}, {count * rows} x {cols}"
        )
    if bias != bool(getattr(family, "has_bias", False)):
        return f"{leaf} is packed {'with' if bias else 'without'} a bias, unlike the model's"
    return None
