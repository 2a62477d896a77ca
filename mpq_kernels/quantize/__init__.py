"""Quantizers: dense weights to codes, scales and zeros. `QUANTIZERS` is the table; a method is one row and one file.

May import: format. Knows no model and no disk: a weight comes in as a matrix, a calibration as its Hessian.
Gives: QUANTIZERS, quantize_weight, quantize_block.
"""

from __future__ import annotations

import torch

from ..errors import QuantizeError
from ..format.layout import WeightLayout
from ..format.weights import QuantizedBlock, QuantizedWeight
from .blocks import BlockSpec, Steps, quantize_segments
from .table import PROPERTIES, QUANTIZERS, Quantizer, find_quantizer, require_no_calibration, suitable

__all__ = [
    "PROPERTIES",
    "QUANTIZERS",
    "BlockSpec",
    "Quantizer",
    "Steps",
    "find_quantizer",
    "quantize_block",
    "quantize_weight",
    "require_no_calibration",
    "suitable",
]


def quantize_block(weight: torch.Tensor, spec: BlockSpec, method: str = "hqq", name: str = "weight") -> QuantizedBlock:
    """Quantize a floating weight [n, k] as one rectangle.

    name: what messages call it. Raises QuantizeError: NaN or Inf, an unknown method, a scale out of range of
    spec.scale_dtype; FormatError: a group size that does not divide k.
    """
    require_no_calibration(method)
    check_weight(weight, name)
    try:
        return _alone(method, weight, spec)
    except QuantizeError as error:
        raise QuantizeError(f"{name}: {error}") from error


def quantize_weight(
    weight: torch.Tensor,
    layout: WeightLayout,
    perm: torch.Tensor | None,
    method: str = "hqq",
    name: str = "weight",
    hessian: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Quantize weight [N, K] (original column order) into the segments of `layout`; the result has that layout.

    perm: int32 [K] when layout.permuted, else None; column j of the codes is column perm[j] of the weight.
    hessian: [K, K], mean of x^T x with damping, in the original column order; for a method that takes calibration.
    Raises QuantizeError as quantize_block does, and when weight or perm do not fit the layout.
    """
    row = find_quantizer(method)
    if hessian is None:
        require_no_calibration(method)
    elif row.on_text is None:
        raise QuantizeError(f"{name}: quantizer={method!r} uses no Hessian; leave it out")
    shape = (layout.out_features, layout.in_features)
    if tuple(weight.shape) != shape:
        raise QuantizeError(f"{name}: the weight is {list(weight.shape)}, and its layout {list(shape)}")
    if layout.permuted != (perm is not None):
        raise QuantizeError(
            f"{name}: the layout is {'' if layout.permuted else 'not '}permuted, and perm is "
            f"{'given' if perm is not None else 'missing'}"
        )
    check_weight(weight, name)
    if perm is not None:
        expected = torch.arange(shape[1], dtype=torch.int32, device=perm.device)
        if perm.dtype != torch.int32 or not torch.equal(perm.sort().values, expected):
            raise QuantizeError(f"{name}: perm must be an int32 permutation of 0..{shape[1] - 1}")
    if hessian is not None and row.on_text is not None and row.steps is not None:
        return row.on_text(weight, layout, perm, hessian, name, row.steps)
    return quantize_segments(weight, layout, perm, name, lambda part, spec, _: _alone(method, part, spec))


def check_weight(weight: torch.Tensor, name: str) -> None:
    """Raise QuantizeError unless weight is a non-empty floating [N, K] without NaN or Inf."""
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        kind = str(weight.dtype).removeprefix("torch.")
        raise QuantizeError(f"{name}: expected a non-empty floating weight [N, K], not {kind} {list(weight.shape)}")
    bad = 0
    first: tuple[int, int, float] | None = None
    rows = max(1, 2**22 // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        places = (~torch.isfinite(weight[start : start + rows])).nonzero()
        if len(places) and first is None:
            row, column = places[0].tolist()
            first = (start + row, column, float(weight[start + row, column]))
        bad += len(places)
    if first is not None:
        raise QuantizeError(
            f"{name}: {bad} of {weight.numel()} weights are NaN or Inf, the first at row {first[0]}, column {first[1]} "
            f"({first[2]}); the checkpoint is damaged or was saved in a dtype that overflowed"
        )


def _alone(method: str, weight: torch.Tensor, spec: BlockSpec) -> QuantizedBlock:
    row = QUANTIZERS[method]
    assert row.steps is not None, "callers refuse methods that need calibration"
    return row.alone(weight, spec, row.steps)
