"""What a backend is: a name, three functions with the signatures of the operators, and its reasons for refusing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..layout import WeightLayout


def _serves_all(layout: WeightLayout) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run packed weights.

    linear: (x, qweight, scales, zeros, perm, bias, segments, out_features, in_features) -> y, as `mpq::linear`.
    grouped: (x, qweight, scales, zeros, perm, bias, offsets, segments, out_features, in_features) -> y, as
        `mpq::grouped_linear`: rows offsets[e]..offsets[e+1] of x through the e-th of the weight's equal row blocks.
    dequantize: (qweight, scales, zeros, perm, segments, out_features, in_features, dtype) -> W, as `mpq::dequantize`.
    devices: types of device it runs on; empty means any.
    available: None when it works on this machine, else the reason why it does not.
    serves: None when it can run a layout, else the reason why it cannot.
    """

    name: str
    summary: str
    devices: tuple[str, ...]
    linear: Callable[..., torch.Tensor]
    grouped: Callable[..., torch.Tensor]
    dequantize: Callable[..., torch.Tensor]
    available: Callable[[], str | None]
    serves: Callable[[WeightLayout], str | None] = _serves_all
    only_on_request: bool = False

    def why_not(self, layout: WeightLayout, device_type: str) -> str | None:
        """None when this backend can run the layout on such a device, else the reason."""
        if self.devices and device_type not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {device_type}"
        return self.available() or self.serves(layout)
