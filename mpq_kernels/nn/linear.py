"""`MixedLinear`: a drop-in for nn.Linear that holds a packed weight of one or several widths.

y[M, N] = x[M, K] @ W[N, K].T + bias        W stays packed; nothing is repacked, cast or derived at load
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from ..backends import BACKENDS, select
from ..backends.base import Product
from ..errors import FormatError, UnsupportedError
from ..format.kinds import kind_of
from ..format.layout import WeightLayout
from ..format.weights import TORCH_DTYPES, PackedWeight
from ..format.words import pack_weight
from ..quantize import quantize_weight

PACKED_NAMES = ("qweight", "scales", "zeros", "perm")
BOUND = (
    "_linear",
    "_dequantize",
    "_embedding",
    "_silu_mul",
    "_backend_name",
    "_device",
)  # what _bind chooses: not state


class PackedOptions(TypedDict, total=False):
    """Keywords of every packed layer over tensors that exist; `MixedLinear` says what they mean."""

    dtype: torch.dtype | None
    backend: str | None
    activations: str


class LayerOptions(PackedOptions, total=False):
    """The same for a layer that makes its own, empty tensors."""

    device: torch.device | str | None


class MixedLinear(nn.Module):
    """Linear layer over a packed weight. State: qweight, scales, zeros, perm (as the layout has them) and bias.

    layout: shape, segments and dtypes. dtype: what `weight.dtype` reports to code that inspects it, and the dtype of
    the bias. backend: a name from backends.BACKENDS; None takes the first that serves the device. activations: "exact",
    or "int8" for the faster product with rounded x, whose error reference_int8.error_bound bounds (CPU only).
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    perm: torch.Tensor | None
    bias: nn.Parameter | None
    # Read by transformers: tensors of packed layers come from a file or a quantizer, never from _init_weights.
    _is_hf_initialized = True
    # Whether the model multiplies by `weight` itself, which then holds the values, made anew at every read.
    weight_is_read = False

    def __init__(
        self,
        layout: WeightLayout,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str | None = None,
        activations: str = "exact",
    ) -> None:
        super().__init__()
        self.layout = layout
        self.in_features, self.out_features = layout.in_features, layout.out_features
        self.dtype = dtype or torch.get_default_dtype()
        specs = layout.tensor_specs()
        for name in PACKED_NAMES:
            spec = specs.get(name)
            buffer = None if spec is None else torch.zeros(spec[1], dtype=TORCH_DTYPES[spec[0]], device=device)
            self.register_buffer(name, buffer)
        empty = torch.zeros(self.out_features, dtype=self.dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))
        self._segments = layout.segment_ints()
        self.wanted_backend, self.activations = backend, activations
        self._bind()

    @classmethod
    def from_packed(
        cls,
        weight: PackedWeight,
        bias: torch.Tensor | None = None,
        **options: Unpack[PackedOptions],
    ) -> MixedLinear:
        """Layer over existing packed tensors, without a copy. bias: [N] or None, whose dtype is the default one."""
        options["dtype"] = options.get("dtype") or (None if bias is None else bias.dtype)
        layer = cls(weight.layout, bias is not None, device="meta", **options)
        layer.assign(weight, bias)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 4,
        group_size: int = 64,
        symmetric: bool = False,
        zero: str = "int",
        scale_dtype: str = "float16",
        quantizer: str = "hqq",
        backend: str | None = None,
    ) -> MixedLinear:
        """Quantize and pack an nn.Linear. `group_size` -1 is all of K; `zero`: a storage kind (format/kinds.py).

        Raises FormatError when the group does not divide in_features, QuantizeError for NaN or Inf in the weight.
        """
        kind = kind_of(symmetric, zero)
        layout = WeightLayout.uniform(linear.out_features, linear.in_features, bits, group_size, kind, scale_dtype)
        quantized = quantize_weight(linear.weight.detach(), layout, None, quantizer)
        packed = pack_weight(quantized).to(linear.weight.device)
        bias = None if linear.bias is None else linear.bias.detach()
        return cls.from_packed(packed, bias, dtype=linear.weight.dtype, backend=backend)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """x: (..., K) fp32, fp16 or bf16. Returns (..., N) in x.dtype; sums are kept in fp32.

        With a gate of x's shape and dtype, x is silu(gate) * x: in the same launch where the backend has that product.
        """
        buffers = self._buffers
        weight = (buffers["qweight"], buffers["scales"], buffers["zeros"], buffers["perm"])
        shape = (self._segments, self.out_features, self.in_features)
        if gate is not None:
            if self._takes_gate(x, gate):
                y: torch.Tensor = self._silu_mul(gate, x, *weight, self.bias, *shape)  # type: ignore[misc]
                return y
            x = nn.functional.silu(gate) * x
        return self._run(x, weight, self.bias, shape)

    def _takes_gate(self, x: torch.Tensor, gate: torch.Tensor) -> bool:
        """Whether silu(gate) * x would be part of the product: the backend has it, and nothing asks for a gradient."""
        if self.qweight.device != self._device:
            self._bind()
        if self._silu_mul is None or x.dtype not in (torch.float16, torch.bfloat16):
            return False
        return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, gate, self.bias))

    def _run(
        self,
        x: torch.Tensor,
        weight: tuple[torch.Tensor | None, ...],
        bias: torch.Tensor | None,
        shape: tuple[list[int], int, int],
    ) -> torch.Tensor:
        """The backend's linear, through autograd only when something asks for a gradient."""
        if weight[0].device != self._device:  # type: ignore[union-attr]
            self._bind()
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return PackedLinearFunction.apply(x, bias, self._linear, self._dequantize, weight, shape)
        return self._linear(x, *weight, bias, *shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W [N, K] in the original column order: (codes - zeros) * scales in fp32, rounded once to dtype (fp32)."""
        if self.qweight.device != self._device:
            self._bind()
        buffers = self._buffers
        weight = (buffers["qweight"], buffers["scales"], buffers["zeros"], buffers["perm"])
        wanted = dtype or torch.float32
        made = wanted if wanted in (torch.float16, torch.bfloat16) else torch.float32
        shape = (self._segments, self.out_features, self.in_features)
        return self._dequantize(*weight, *shape, made).to(wanted)

    @property
    def packed(self) -> PackedWeight:
        """The packed weight as a value: the same tensors, checked."""
        return PackedWeight(self.layout, self.qweight, self.scales, self.zeros, self.perm)

    @property
    def weight(self) -> torch.Tensor:
        """Stand-in [N, K] with the dtype and device that other code looks for; one element in memory.

        It reads as NaN, so that code which computes with it instead of calling the layer is noticed; `dequantize()`
        gives the values. With `weight_is_read` it holds them.
        """
        if self.weight_is_read and self._backend_name != "none":
            return mark_initialized(self.dequantize(self.dtype))
        return self.stand_in(self.out_features)

    def stand_in(self, rows: int) -> torch.Tensor:
        """`weight` of so many rows. Until the layer has its tensors it is on the meta device, where writes are lost.

        _init_weights of a parent module may write to it: in transformers' functions, which heed the mark, or in place.
        """
        if self._backend_name == "none":
            tensor = torch.empty(rows, self.in_features, dtype=self.dtype, device="meta")
        else:
            nan = torch.full((), float("nan"), dtype=self.dtype, device=self.qweight.device)
            tensor = nan.expand(rows, self.in_features)
        return mark_initialized(tensor)

    @property
    def backend(self) -> str:
        """Name of the backend in use, "none" on the meta device."""
        return self._backend_name

    def _bind(self) -> None:
        """Choose the backend for the device that the tensors are on now."""
        self._linear: Product
        self._dequantize: Product
        self._embedding: Product
        # Compared at every call: offloading puts tensors elsewhere without asking the layer.
        self._device = self.qweight.device
        if self._device.type == "meta":
            # Shapes and dtypes only: the operators' fakes serve, and the choice is made when the tensors arrive.
            chosen, self._backend_name = BACKENDS["cpu"], "none"
        else:
            chosen = select(self.layout, self._device.type, self.wanted_backend, self.activations)
            self._backend_name = chosen.name
        exact = self.activations == "exact" and self._backend_name != "none"
        self._silu_mul: Product | None = chosen.silu_mul_linear if exact else None
        self._take_products(*chosen.products(self.activations))
        self._dequantize, self._embedding = chosen.dequantize, chosen.embedding

    def _take_products(self, linear: Product, grouped: Product) -> None:
        """Keep the product that this layer calls."""
        self._linear = linear if self._backend_name != "none" else only_shapes(linear)

    def assign(self, weight: PackedWeight, bias: torch.Tensor | None = None) -> None:
        """Put packed tensors and a bias in place of the present ones, without a copy, and choose the backend again.

        Raises FormatError when the weight has another layout or the bias is not [N].
        """
        if weight.layout != self.layout:
            raise FormatError(f"the weight's layout {weight.layout} is not this layer's {self.layout}")
        if (bias is None) != (self.bias is None) or (bias is not None and tuple(bias.shape) != (self.out_features,)):
            given = None if bias is None else list(bias.shape)
            raise FormatError(f"bias must be {None if self.bias is None else [self.out_features]}, not {given}")
        for name, tensor in weight.tensors().items():
            self._buffers[name] = tensor
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self._bind()

    def set_activations(self, activations: str) -> None:
        """Take "exact" or "int8" activations from now on. Raises UnsupportedError, and stays as it is, if it cannot."""
        device = self.qweight.device.type
        select(self.layout, "cpu" if device == "meta" else device, self.wanted_backend, activations)
        self.activations = activations
        self._bind()

    def rebind(self) -> None:
        """Choose the backend again after a loader has put tensors in place by itself."""
        self._bind()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MixedLinear:
        # .half(), .to(bfloat16) and the like must not touch packed tensors: scales in another dtype are other weights.
        before = dict(self._buffers)
        target = fn(torch.zeros(0, dtype=self.dtype, device=self.qweight.device))
        if target.device.type != "meta":
            # Refuse before anything has moved.
            select(self.layout, target.device.type, self.wanted_backend, self.activations)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        self.dtype = target.dtype
        self._bind()
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        # nn.Module would cast in silence; a packed tensor of another dtype is another weight.
        for name in PACKED_NAMES:
            given, held = state_dict.get(prefix + name), self._buffers[name]
            if given is not None and held is not None and given.dtype != held.dtype:
                errors.append(f"{prefix}{name} is {given.dtype} in the state dict, {held.dtype} in the layer")
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in BOUND}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind()

    def extra_repr(self) -> str:
        """Shape, widths, groups, stored bits per weight, backend."""
        segments = self.layout.segments
        bits = "|".join(str(b) for b in dict.fromkeys(s.bits for s in segments))
        groups = "|".join(str(g) for g in dict.fromkeys(s.group_size for s in segments))
        zero = "|".join(dict.fromkeys(s.zero for s in segments))
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={bits}, group_size={groups}, "
            f"zero={zero}, bpw={self.layout.size().bits_per_weight:.3f}, bias={self.bias is not None}, "
            f"backend={self.backend}" + ("" if self.activations == "exact" else f", activations={self.activations}")
        )


class PackedLinearFunction(torch.autograd.Function):
    """Gradients with respect to x and bias through a packed weight, which itself is constant."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        linear: Callable[..., torch.Tensor],
        dequantize: Callable[..., torch.Tensor],
        weight: tuple[torch.Tensor | None, ...],
        shape: tuple[list[int], int, int],
    ) -> torch.Tensor:
        """As `mpq::linear`."""
        # As torch's own linear: what offloading has brought for the forward pass also serves the backward pass.
        ctx.save_for_backward(*weight)
        ctx.dequantize, ctx.shape = dequantize, shape
        return linear(x, *weight, bias, *shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """grad_x = grad @ W, grad_bias = the sum of grad over tokens."""
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.dequantize(*ctx.saved_tensors, *ctx.shape, grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_bias, None, None, None, None


def only_shapes(product: Product) -> Product:
    """A backend's product for a weight on the meta device, which gives a shape; an x with values is refused."""

    def checked(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if x.device.type != "meta":
            raise UnsupportedError(
                f"x is on {x.device} and the packed weight on the meta device, without values: load the weight; where "
                "it is offloaded, call the layer itself and not its forward, so that hooks bring it"
            )
        return product(x, *rest)

    return checked


def mark_initialized(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, marked for transformers as one that must not be initialized; the mark does not survive a view."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


def packed_modules(model: nn.Module) -> Sequence[tuple[str, MixedLinear]]:
    """(name, module) of every module of a model that owns packed tensors."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MixedLinear)]
