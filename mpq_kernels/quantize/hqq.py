"""Search of scale and zero: clip grid, least squares and half-quadratic steps, best of all per group.

W is approximated by (codes - zero) * scale, or codes * scale + minimum, and four moves compete for each group:

    rtn      min/max rounding, the starting point, so that no group ends up worse than with rtn
    clip     the range of rtn shrunk towards 0, at each neighbouring zero point
    fit      codes fixed: the scale (and a float zero or minimum) of least squares
    robust   the same with the residuals of clipped weights taken out by an l_p shrinkage, p < 1: the half-quadratic
             split of HQQ, https://mobiusml.github.io/hqq_blog/

Every candidate is rounded to its stored dtypes first and judged by the squared error that is then left: of the weights,
or, with the Hessian H = mean of x^T x of a calibration, of what the group adds to the outputs, e H e^T = |e F|^2 with
H = F F^T. Least squares are those of the same norm.

Perplexity of TinyStories-656K, groups of 64, integer zeros, geometric mean over 8 random orders of the columns
(20,000 tokens, windows of 256; the standard deviation of one order is 1.2% / 2.7% / 6% at 4 / 3 / 2 bits):

    bits                                        4       3       2
    rtn                                     54.12   71.72   710.1
    clip grid of 25 steps alone             54.37   65.65   187.6
    HQQ as published, float zeros           55.50   66.70   301.5
    this search                             54.42   65.85   180.6
    this search, float zeros                55.29   66.78   135.1

One order, such as the columns' own, says little: there, on 60,000 tokens, the clip grid has 52.19 and this search 53.60
at 3 bits, and over it and three random orders 52.75 and 52.65 (50.7 to 54.8 and 50.8 to 53.6; HQQ, float zeros: 55.14).

Judging by |error|**p, p = 1.5, 2.4, 2.5, 3, 4, adding a penalty on the sum of errors, flipping codes near a tie so that
it vanishes, weighting columns by their norm or by the gain of the norm before them (squared), or un-shrinking the scale
afterwards moved single figures by less than these deviations, or made them worse. With a Hessian: quantize/gptq.py.
"""

from __future__ import annotations

import torch

from .blocks import BlockSpec, row_sum, storable
from .rtn import range_search

# Within 0.04% / 0.2% / 1% (2 / 3 / 4 bits) of the squared error of an exhaustive search over every zero point and 37
# ratios, measured on normal weights in groups of 64 with integer zeros.
RATIOS = (0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44, 0.36)
# With a Hessian each candidate is also another draw of the rounding, whose luck counts. Perplexity with RATIOS and with
# these, on one text, as in gptq.py: TinyStories-656K 52.1 and 50.6 at 3 bits, 118.6 and 114.1 at 2; gutenberg-6m 25.07
# and 25.03, 28.22 and 28.08.
FINE_RATIOS = tuple(1 - step / 40 for step in range(1, 27))
ZERO_STEPS = (0.0, -1.0, 1.0)
FIT_STEPS = 3
MAX_FACTOR = 512  # columns g of a group up to which callers give all of F: g multiplications for a weight and candidate
# Shrinkage in units of one step: |x| - |x|**(p-1) / beta with p = 1/2 leaves only residuals above beta**(-2/3) steps.
# Inside the range residuals end at 1/2, so beta = 2 (0.63 steps) takes out the clipped weights and nothing else.
BETA = 2.0


class _Search:
    """Best stored (scale, zero) so far of groups [G, g], and two work buffers of that size.

    factor: F [g, g] of the columns of all groups, its diagonal alone [g], or None for the plain squared error.
    """

    def __init__(self, groups: torch.Tensor, spec: BlockSpec, factor: torch.Tensor | None = None) -> None:
        self.groups, self.spec, self.factor = groups, spec, factor
        self.one = self._seen(torch.ones_like(groups[:1]))
        self.steps, self.work = torch.empty_like(groups), torch.empty_like(groups)
        self.scale, self.zero = range_search(groups, spec)
        self.error = self._judge(self.scale, self.zero)

    def _judge(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Squared error [G, 1] of stored scales and zeros [G, 1]. Overwrites both buffers."""
        self._step(scale, zero)
        torch.round(self.steps, out=self.work).clamp_(0, self.spec.max_code)
        residual = self._seen(self.steps.sub_(self.work))
        return row_sum(residual.square_()).mul_(scale * scale)

    def _step(self, scale: torch.Tensor, zero: torch.Tensor) -> None:
        """Where the weights lie among the codes, into the buffer `steps`: StorageKind.steps without a new tensor."""
        if self.spec.zero == "min":
            torch.sub(self.groups, zero, out=self.steps).div_(scale)
        else:
            torch.div(self.groups, scale, out=self.steps).add_(zero)

    def _seen(self, values: torch.Tensor) -> torch.Tensor:
        """Values [G, g] such that their plain squares are what counts: the same ones without a factor."""
        if self.factor is None:
            return values
        return values @ self.factor if self.factor.dim() == 2 else values * self.factor

    def _mean(self, values: torch.Tensor) -> torch.Tensor:
        """The constants [G, 1] that are nearest to values which `_seen` gave."""
        if self.factor is None:
            return row_sum(values) / values.shape[1]
        return row_sum(values * self.one) / row_sum(self.one * self.one)

    def _spread(self, constant: torch.Tensor) -> torch.Tensor:
        """What `_seen` makes of groups that are constants [G, 1]."""
        return constant if self.factor is None else constant * self.one

    def consider(self, scale: torch.Tensor, zero: torch.Tensor) -> None:
        """Keep a candidate [G, 1] for the groups where it has the smaller error."""
        scale, zero = storable(scale, zero, self.spec)
        error = self._judge(scale, zero)
        better = error < self.error  # False for NaN, which scales of 0 and zeros of Inf give
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def fit(self, robust: bool) -> None:
        """Consider the least-squares scale (and float zero or minimum) for the codes of the best candidate."""
        self._step(self.scale, self.zero)
        codes = torch.round(self.steps, out=self.work).clamp_(0, self.spec.max_code)
        target = self.groups
        if robust:
            residual = self.steps.sub_(codes)
            size = residual.abs()
            kept = size.sub_(size.rsqrt().div_(BETA)).clamp_(min=0).copysign_(residual)
            target = self.groups - kept.mul_(self.scale)
        codes, target = self._seen(codes), self._seen(target)
        if self.spec.kind.stored == "scales":
            mean_code, mean = self._mean(codes), self._mean(target)
            codes = codes - self._spread(mean_code)
            scale = row_sum(codes * target) / row_sum(codes * codes)
            self.consider(scale, mean - mean_code * scale if self.spec.zero == "min" else mean_code - mean / scale)
        else:
            codes = codes - self._spread(self.zero)
            scale = row_sum(codes * target) / row_sum(codes * codes)
            if self.spec.zero == "int":
                # The zero that balances the residuals, before the scale that goes with the present one.
                shift = self._mean(codes - target / self.scale)
                self.consider(self.scale, self.zero + shift)
            self.consider(scale, self.zero)


def search_scale_and_zero(
    groups: torch.Tensor, spec: BlockSpec, factor: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored scales and zeros [G, 1] (fp32) of groups [G, g]. Raises QuantizeError.

    factor: F fp32 [g, g] with H = F F^T of the columns that all groups have in common, its diagonal alone [g], or None.
    """
    search = _Search(groups, spec, factor)
    scale, zero = search.scale, search.zero
    ratios = RATIOS if factor is None else FINE_RATIOS
    for step in ZERO_STEPS if spec.fixed_zero is None else (0.0,):
        for ratio in ratios if step == 0 else (1.0, *ratios):
            # A minimum is -zero point * scale.
            moved = (zero - step * scale) * ratio if spec.zero == "min" else zero + step
            search.consider(scale * ratio, moved)
    for _ in range(FIT_STEPS):
        search.fit(robust=False)
        search.fit(robust=True)
    return search.scale, search.zero
