"""Quantizers: dense weights to codes, scales and zeros. `QUANTIZERS` is the table; a method is one row and one file.

May import: format. Knows no model and no disk: a weight comes in as a matrix, a calibration as its Hessian.
Gives: QUANTIZERS, quantize_weight, quantize_block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import QuantizeError
from ..format.layout import WeightLayout
from ..format.weights import QuantizedBlock, QuantizedWeight
from .blocks import BlockSpec, quantize_groups
from .gptq import quantize_with_hessian
from .hqq import search_scale_and_zero
from .hqq_outputs import search_with_hessian
from .rtn import round_to_nearest

__all__ = [
    "QUANTIZERS",
    "BlockSpec",
    "Quantizer",
    "quantize_block",
    "quantize_weight",
    "find_quantizer",
    "require_no_calibration",
]


Calibrated = Callable[[torch.Tensor, WeightLayout, torch.Tensor | None, torch.Tensor, str], QuantizedWeight]


@dataclass(frozen=True)
class Quantizer:
    """A method. run: (finite weight [n, k], spec) -> codes; None for one that asks for calibration.

    run_calibrated: (finite weight [N, K], layout, perm, Hessian, name) -> codes; None for one that has no use for it.
    whole_model: it sees all weights at once and is run by `pack` alone.
    """

    name: str
    run: Callable[[torch.Tensor, BlockSpec], QuantizedBlock] | None
    summary: str
    run_calibrated: Calibrated | None = None
    whole_model: bool = False

    @property
    def needs_calibration(self) -> bool:
        """Whether it asks for text to run."""
        return self.run is None

    @property
    def takes_calibration(self) -> bool:
        """Whether it has a use for text."""
        return self.run_calibrated is not None or self.whole_model


QUANTIZERS: dict[str, Quantizer] = {
    q.name: q
    for q in (
        Quantizer("rtn", lambda w, s: quantize_groups(w, s, round_to_nearest), "round to nearest, min/max range"),
        Quantizer(
            "hqq",
            lambda w, s: quantize_groups(w, s, search_scale_and_zero),
            "scale and zero of least squared error (on a text: of the outputs): clip grid and half-quadratic steps",
            search_with_hessian,
        ),
        Quantizer(
            "gptq",
            None,
            "column by column, errors made up for by later columns; needs calibration",
            quantize_with_hessian,
        ),
        Quantizer(
            "auto-round",
            None,
            "rounding learned block by block, by the library auto-round; needs calibration",
            whole_model=True,
        ),
    )
}


def find_quantizer(method: str) -> Quantizer:
    """The table's row. Raises QuantizeError with the list of names for an unknown one."""
    if method not in QUANTIZERS:
        raise QuantizeError(f"there is no quantizer {method!r}; choose one of {', '.join(sorted(QUANTIZERS))}")
    return QUANTIZERS[method]


def require_no_calibration(method: str) -> None:
    """Raise QuantizeError for an unknown method, and for one that needs calibration, where none can be given."""
    if find_quantizer(method).needs_calibration:
        raise QuantizeError(
            f"quantizer={method!r} needs calibration, which only `pack` gives it: "
            "pack(model_dir, out_dir, plan, quantizer, calibration=...)"
        )


def quantize_block(weight: torch.Tensor, spec: BlockSpec, method: str = "hqq", name: str = "weight") -> QuantizedBlock:
    """Quantize a floating weight [n, k] as one rectangle.

    name: what messages call it. Raises QuantizeError: NaN or Inf, an unknown method, a scale out of range of
    spec.scale_dtype; FormatError: a group size that does not divide k.
    """
    require_no_calibration(method)
    check_weight(weight, name)
    return _run(method, weight, spec, name)


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
    calibrated = find_quantizer(method).run_calibrated
    if hessian is None:
        require_no_calibration(method)
    elif calibrated is None:
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
    if hessian is not None and calibrated is not None:
        return calibrated(weight, layout, perm, hessian, name)
    blocks = []
    for s in layout.segments:
        spec = BlockSpec(s.bits, s.group_size, s.zero, layout.scale_dtype)
        # Columns are picked one segment at a time, so that a permuted copy of the whole weight is never held.
        part = weight[s.n0 : s.n1]
        part = part[:, s.k0 : s.k1] if perm is None else part[:, perm[s.k0 : s.k1].long()]
        where = f"{name} rows {s.n0}..{s.n1}, columns {s.k0}..{s.k1}" if len(layout.segments) > 1 else name
        blocks.append((s.n0, s.k0, _run(method, part, spec, where)))
    return QuantizedWeight(tuple(blocks), perm)


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


def _run(method: str, weight: torch.Tensor, spec: BlockSpec, where: str) -> QuantizedBlock:
    run = QUANTIZERS[method].run
    assert run is not None, "callers refuse methods that need calibration"
    try:
        return run(weight, spec)
    except QuantizeError as error:
        raise QuantizeError(f"{where}: {error}") from error
