"""What a backend is: a name, four functions with the signatures of the operators, and its reasons for refusing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import UnsupportedError
from ..format.layout import WeightLayout

# What x is multiplied as: as it is, or rounded to int8 for each token and block of columns (reference_int8.py).
ACTIVATIONS = ("exact", "int8")
Product = Callable[..., torch.Tensor]


def _any_layout(layout: WeightLayout) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run packed weights.

    linear: x -> y with the arguments of `mpq::linear`; operands.on_weight makes it from a function of a PackedWeight.
    grouped: the same with those of `mpq::grouped_linear`: rows offsets[e]..offsets[e+1] of x through the e-th of the
        weight's equal row blocks.
    linear_int8, grouped_int8: the same with x rounded to int8; None where there are no such kernels.
    silu_mul_linear: linear of silu(gate) * up in one launch, with the arguments of `mpq::silu_mul_linear`, or None.
    dequantize: -> W with the arguments of `mpq::dequantize`.
    embedding: ids -> rows of W with the arguments of `mpq::embedding`.
    devices: types of device it runs on; empty means any.
    why_unavailable: None when it works on this machine, else the reason why it does not.
    why_not_layout: None when it can run a layout, else the reason why it cannot.
    """

    name: str
    summary: str
    devices: tuple[str, ...]
    linear: Product
    grouped: Product
    dequantize: Product
    embedding: Product
    why_unavailable: Callable[[], str | None]
    why_not_layout: Callable[[WeightLayout], str | None] = _any_layout
    only_on_request: bool = False
    linear_int8: Product | None = None
    grouped_int8: Product | None = None
    silu_mul_linear: Product | None = None

    def products(self, activations: str) -> tuple[Product, Product]:
        """(linear, grouped) for "exact" or "int8". Raises UnsupportedError when there are none."""
        if activations == "exact":
            return self.linear, self.grouped
        if self.linear_int8 is None or self.grouped_int8 is None:
            raise UnsupportedError(f"backend {self.name}: {self._lacks(activations)}")
        return self.linear_int8, self.grouped_int8

    def why_not(self, layout: WeightLayout, device_type: str, activations: str = "exact") -> str | None:
        """None when this backend can run the layout on such a device with such activations, else the reason."""
        if self.devices and device_type not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {device_type}"
        if activations != "exact" and self.linear_int8 is None:
            return self._lacks(activations)
        return self.why_unavailable() or self.why_not_layout(layout)

    def _lacks(self, activations: str) -> str:
        return f'has no kernels for {activations} activations; leave them "exact"'
