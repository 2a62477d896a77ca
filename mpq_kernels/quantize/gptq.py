"""GPTQ: codes chosen column by column, each column's rounding error made up for by the columns still to come.

    error of a row   (w - q) H (w - q)^T,  H = mean of x^T x over calibration tokens
    H^-1 = U^T U     with U upper triangular
    column j         q_j = nearest stored value of w_j;  w_later -= (w_j - q_j) / U_jj * U_j,later

The idea is that of https://arxiv.org/abs/2210.17323. Scale and zero of a group are searched when the group is reached,
on columns that already carry the corrections of all columns before them, by the search of hqq, which counts an error as
what is left of it when later columns have made up for it.
Rows do not depend on each other, so every row band of a layout runs on its own; along K the codes' order counts, which
is that of the permutation where there is one. Weights are corrected in fp32, the factor is computed in fp64.

Perplexity of TinyStories-656K and gutenberg-6m, groups of 64, integer zeros, without the head (60,000 tokens, windows
of 256), geometric mean over three calibrations of about 60,000 tokens of other texts. Another text moves single figures
by 0.5% / 1% / 5% at 4 / 3 / 2 bits, so that at 4 bits the gain is hardly more than what chance does:

                                       TinyStories-656K       gutenberg-6m
    bits                              4       3       2        3       2
    hqq                           43.69   53.60   165.0    25.17   28.74
    hqq on the text               43.38   50.69   115.8    25.02   28.15
    this, groups judged as hqq's  43.73   49.40    97.6    24.98   27.20
    this                          43.59   48.11    91.1    24.82   27.05
    this, damping 0.01            43.51   49.19    93.8
    this, damping 0.2             43.69   48.59    88.7
"""

from __future__ import annotations

import torch

from ..errors import QuantizeError
from ..format.layout import Segment, WeightLayout
from ..format.weights import QuantizedBlock, QuantizedWeight
from .blocks import BlockInWork, BlockSpec, Steps, naming, row_parts
from .hqq import MAX_FACTOR, search_scale_and_zero

# Columns corrected one by one before the rest of the row is corrected by a single matrix product.
BLOCK_COLUMNS = 128


def quantize_with_hessian(
    weight: torch.Tensor,
    layout: WeightLayout,
    perm: torch.Tensor | None,
    hessian: torch.Tensor,
    name: str = "weight",
    steps: Steps = Steps(search_scale_and_zero),  # noqa: B008  (a frozen value)
) -> QuantizedWeight:
    """Codes of a finite weight [N, K] (original column order) of least error under `hessian`.

    hessian: [K, K] in the original column order, symmetric and positive definite, on any device; the work is done
    there and the result lies where the weight is. perm: int32 [K] when layout.permuted, else None.
    Raises QuantizeError: a Hessian that is misshapen, not finite or not positive definite, a scale out of range.
    """
    order = None if perm is None else perm.to(hessian.device).long()
    factor = inverse_factor(hessian, layout.in_features, order, name)
    blocks = []
    for band in layout.bands():
        rows = weight[band[0].n0 : band[0].n1].to(hessian.device)
        work = rows.to(torch.float32, copy=True) if order is None else rows.float()[:, order]
        for segment in band:
            with naming(name, segment, layout):
                block = _quantize_segment(work, segment, BlockSpec.of(segment, layout), factor, steps)
            blocks.append((segment.n0, segment.k0, _to(block, weight.device)))
    return QuantizedWeight(tuple(blocks), perm)


def activation_order(hessian: torch.Tensor) -> torch.Tensor:
    """Columns by falling mean square of their input, int32 [K] on the CPU: the most used are rounded first."""
    return hessian.diagonal().sort(descending=True, stable=True).indices.to("cpu", torch.int32)


def check_hessian(hessian: torch.Tensor, size: int, name: str) -> None:
    """Raise QuantizeError unless hessian is a finite floating [size, size]."""
    if tuple(hessian.shape) != (size, size) or not hessian.is_floating_point():
        raise QuantizeError(f"{name}: the Hessian is {list(hessian.shape)}, and the weight has K={size} columns")
    if not bool(torch.isfinite(hessian).all()):
        raise QuantizeError(f"{name}: the Hessian holds NaN or Inf")


def inverse_factor(hessian: torch.Tensor, size: int, order: torch.Tensor | None, name: str) -> torch.Tensor:
    """Upper triangular U (fp32) with U^T U = hessian^-1, of the columns in `order`. Raises QuantizeError."""
    check_hessian(hessian, size, name)
    matrix = hessian.double() if order is None else hessian.double()[order][:, order]
    # With the columns reversed, Cholesky gives H = R R^T with R upper triangular, and U = R^-1: no inverse of H itself.
    matrix = matrix.flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(matrix)
    del matrix  # a temporary of 8 K^2 bytes, as the next one is
    if int(failed):
        raise QuantizeError(
            f"{name}: the Hessian is not positive definite (its inputs lie in a subspace); add damping to its diagonal"
        )
    upper = lower.flip(0, 1)
    del lower
    one = torch.eye(size, dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, one, upper=True).float()


def _quantize_segment(
    work: torch.Tensor, segment: Segment, spec: BlockSpec, factor: torch.Tensor, steps: Steps
) -> QuantizedBlock:
    """Quantize columns k0..k1 of the band `work` [n, K] and correct all columns to their right, in place."""
    made = BlockInWork(len(work), segment.cols, spec, work.device)
    size = made.size
    # A block is a part of one group, or several whole groups: a group's first column is then always corrected up to it.
    step = BLOCK_COLUMNS if size > BLOCK_COLUMNS else BLOCK_COLUMNS // size * size
    spans = [
        (start, min(start + step, end))
        for first, end in (
            [(g, g + size) for g in range(0, segment.cols, size)] if step < size else [(0, segment.cols)]
        )
        for start in range(first, end, step)
    ]
    for start, end in spans:
        first, last = segment.k0 + start, segment.k0 + end
        errors = torch.empty(len(work), end - start, device=work.device)
        for column in range(start, end):
            place = segment.k0 + column
            if column % size == 0:
                own = slice(place, place + size)
                scale, zero = _search_rows(work[:, own], spec, _group_factor(factor[own, own]), steps)
                made.scales[:, column // size], made.zeros[:, column // size] = scale[:, 0], zero[:, 0]
            value = work[:, place : place + 1]
            code = steps.rounding(value, scale, zero, spec)
            made.codes[:, column] = code[:, 0]
            error = (value - spec.kind.decode(code, scale, zero)) / factor[place, place]
            errors[:, column - start] = error[:, 0]
            work[:, place + 1 : last] -= error * factor[place, place + 1 : last]
        work[:, last:] -= errors @ factor[first:last, last:]
    return made.block()


def _group_factor(upper: torch.Tensor) -> torch.Tensor:
    """F of the search for a group whose part of U is `upper` [g, g].

    What an error e of the group costs once all later columns have made up for it as they can is e (U_gg^T U_gg)^-1 e^T.
    """
    if len(upper) > MAX_FACTOR:
        return upper.diagonal().reciprocal()
    one = torch.eye(len(upper), dtype=torch.float64, device=upper.device)
    return torch.linalg.solve_triangular(upper.double(), one, upper=True).float()


def _search_rows(
    group: torch.Tensor, spec: BlockSpec, factor: torch.Tensor, steps: Steps
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored scale and zero [n, 1] of one group of every row [n, g]; some rows at a time."""
    found = [steps.search(group[rows].contiguous(), spec, factor) for rows in row_parts(*group.shape)]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _to(block: QuantizedBlock, device: torch.device) -> QuantizedBlock:
    zeros = None if block.zeros is None else block.zeros.to(device)
    return QuantizedBlock(block.bits, block.codes.to(device), block.scales.to(device), zeros, block.zero)
