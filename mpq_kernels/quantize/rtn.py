"""Round to nearest: scale and zero from the range of each group, nothing searched.

Asymmetric: the range [min, max], widened to include 0, is cut into 2**bits - 1 steps and the zero point is rounded, so
that a weight of 0 stays exactly 0 and integer zeros always fit their codes. This is the plain min/max rounding of the
reference figures: with unrounded scales TinyStories-656K has perplexity 43.29 / 59.62 / 558.8 at 4 / 3 / 2 bits.

Symmetric: codes reach one step further below the zero point than above it,

    code   0 ... 2**(bits-1) ... 2**bits - 1
    value  -2**(bits-1) s  0  (2**(bits-1) - 1) s

so the sign of the scale turns the long side towards the larger weights. Two scales are tried and the one with the
smaller squared error kept for each group: the least that clips nothing, which restores weights that already lie on a
grid, and max|w| / (2**(bits-1) - 1/2), the least that is off by at most half a step at both ends. One bit has the
values -s/2 and s/2; s = 2 mean|w| is their least-squares scale. Around half of the codes (`half`) both sides have the
same length, and the scale is the least that clips nothing.

From a minimum (`min`): [min, max] as it is, so that a range away from 0 costs nothing; 0 itself may be lost. A group of
one value has the scale 0 and that value as its minimum.

Else a group of zeros, or of weights so small that their scale is 0 in its dtype, gets the scale 0: kernels add codes
and zeros up apart, and their roundings, times 0, stay 0.
"""

from __future__ import annotations

import torch

from .blocks import BlockSpec, checked_scale, keep_better, row_sum, squared_error, storable


def range_search(
    groups: torch.Tensor, spec: BlockSpec, factor: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored scales and zeros [G, 1] (fp32) of groups [G, g], whatever the factor is. Raises QuantizeError."""
    low, high = groups.aminmax(dim=1, keepdim=True)
    if spec.fixed_zero is not None:
        return _symmetric(groups, low, high, spec)
    if spec.zero == "min":
        span = high - low  # the other form may be off by a rounding, this one overflow
        steps = torch.where(torch.isfinite(span), span / spec.max_code, high / spec.max_code - low / spec.max_code)
        return checked_scale(steps, spec), checked_scale(low, spec, "minimum")
    around_zero = _from_range(low.clamp(max=0), high.clamp(min=0), spec)
    if spec.zero == "int":
        return around_zero
    # A float zero can also describe a range away from 0, at a precision that falls with the distance.
    steps = torch.where(high > low, (high - low) / spec.max_code, around_zero[0])
    scale, zero = storable(steps, -low / steps, spec)
    error = squared_error(groups, scale, zero, spec)
    usable = torch.isfinite(zero) & (scale > 0) & (around_zero[0] > 0)
    error = torch.where(usable, error, torch.inf)
    first = (squared_error(groups, *around_zero, spec), *around_zero)
    return keep_better(first, (error, scale, zero))[1:]


def _from_range(low: torch.Tensor, high: torch.Tensor, spec: BlockSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero that put codes 0 and max_code at low <= 0 <= high; scale 0 where both are 0, or next to it."""
    scale = checked_scale(high / spec.max_code - low / spec.max_code, spec)  # their difference may overflow fp32
    some = scale > 0
    zero = -torch.where(some | (low == 0), low, 0.0) / torch.where(some, scale, 1.0)
    return scale, storable(scale, zero, spec)[1]


def _symmetric(
    groups: torch.Tensor, low: torch.Tensor, high: torch.Tensor, spec: BlockSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    below = spec.fixed_zero
    assert below is not None
    zero = torch.full_like(low, below)
    if spec.bits == 1:
        return checked_scale(row_sum(groups.abs()) * (2 / groups.shape[1]), spec), zero
    if spec.zero == "half":
        return checked_scale(torch.maximum(high, -low) / below, spec), zero
    above = below - 1
    sign = torch.where(high > -low, -1.0, 1.0)
    large, small = torch.maximum(high, -low), torch.minimum(high, -low)
    best = None
    for steps in (torch.maximum(large / below, small / above), large / (below - 0.5)):
        scale = checked_scale(steps * sign, spec)
        found = (squared_error(groups, scale, zero, spec), scale, zero)
        best = found if best is None else keep_better(best, found)
    assert best is not None
    return best[1], zero
