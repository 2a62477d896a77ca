"""The search of a method on a calibration text: scales and zeros of least error in the outputs, no errors made up for.

Each group of columns is judged by e H e^T with its own part of the Hessian, so a change in one group makes up for no
error in another: that is what gptq does, at several times the cost of this.
"""

from __future__ import annotations

import torch

from ..errors import QuantizeError
from ..format.layout import WeightLayout
from ..format.weights import QuantizedBlock, QuantizedWeight
from .blocks import BlockInWork, BlockSpec, Steps, quantize_segments, row_parts
from .gptq import check_hessian
from .hqq import MAX_FACTOR


def search_with_hessian(
    weight: torch.Tensor,
    layout: WeightLayout,
    perm: torch.Tensor | None,
    hessian: torch.Tensor,
    name: str,
    steps: Steps,
) -> QuantizedWeight:
    """Codes of a finite weight [N, K] (original column order), as gptq.quantize_with_hessian, without corrections.

    Raises QuantizeError: a Hessian that is misshapen, not finite or not positive definite, a scale out of range.
    """
    check_hessian(hessian, layout.in_features, name)

    def run(part: torch.Tensor, spec: BlockSpec, columns: torch.Tensor) -> QuantizedBlock:
        made = BlockInWork(len(part), len(columns), spec, weight.device)
        for group in range(made.groups):
            span = slice(group * made.size, (group + 1) * made.size)
            factor = _group_factor(hessian, columns[span].to(hessian.device))
            for rows in row_parts(len(part), made.size):
                values = part[rows, span].to(hessian.device, torch.float32).contiguous()
                made.quantize(rows, slice(group, group + 1), values, steps, factor)
        return made.block()

    return quantize_segments(weight, layout, perm, name, run)


def _group_factor(hessian: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """F of the search for a group of columns. Raises QuantizeError."""
    if len(columns) > MAX_FACTOR:
        return hessian.diagonal()[columns].clamp(min=0).sqrt().float()
    factor, failed = torch.linalg.cholesky_ex(hessian[columns][:, columns].double())
    if int(failed):
        raise QuantizeError("the Hessian is not positive definite; add damping to its diagonal")
    return factor.float()
