"""The table of quantizers as test parameters: each with the reason why a property is not asked of it."""

from collections.abc import Iterable

import pytest
import torch

from mpq_kernels.format.layout import WeightLayout
from mpq_kernels.format.weights import QuantizedBlock, QuantizedWeight
from mpq_kernels.quantize import PROPERTIES, QUANTIZERS, BlockSpec, quantize_block, quantize_weight

BASELINE = "rtn"  # what others are compared with; it has no search
METHODS = [name for name, row in QUANTIZERS.items() if not row.whole_model]  # the others: tests/calibrate
CALIBRATED = [name for name, row in QUANTIZERS.items() if row.on_text is not None]


def having(prop: str, methods: Iterable[str] = METHODS) -> list:
    """The methods of which a property is asked, the exempt ones as skips."""
    assert prop in PROPERTIES
    return [pytest.param(name, marks=exemption(name, prop)) for name in methods]


def exemption(method: str, prop: str) -> tuple:
    """The skip mark of a method that lacks a property."""
    reason = QUANTIZERS[method].exempt.get(prop)
    return () if reason is None else (pytest.mark.skip(reason=f"{method}: {reason}"),)


def weight_by(
    method: str, weight: torch.Tensor, layout: WeightLayout, perm: torch.Tensor | None = None, name: str = "weight"
) -> QuantizedWeight:
    """Without a text where the method can, else with inputs that do not depend on each other."""
    hessian = torch.eye(weight.shape[1], dtype=torch.float64) if QUANTIZERS[method].needs_calibration else None
    return quantize_weight(weight, layout, perm, method, name, hessian)


def block_by(method: str, weight: torch.Tensor, spec: BlockSpec, name: str = "weight") -> QuantizedBlock:
    """One rectangle, as weight_by."""
    if not QUANTIZERS[method].needs_calibration:
        return quantize_block(weight, spec, method, name)
    layout = WeightLayout.uniform(*weight.shape, spec.bits, spec.group_size, spec.zero, spec.scale_dtype)
    return weight_by(method, weight, layout, None, name).blocks[0][2]
