"""The search of hqq on a calibration text: scales and zeros of least error in the outputs, codes by plain rounding.

Each group of columns is judged by e H e^T with its own part of the Hessian, so a change in one group makes up for no
error in another: that is what gptq does, at several times the cost of this.
"""

from __future__ import annotations

import torch

from ..errors import QuantizeError
from ..format.layout import Segment, WeightLayout
from ..format.weights import TORCH_DTYPES, QuantizedBlock, QuantizedWeight
from .blocks import CHUNK_WEIGHTS, BlockSpec, encode
from .gptq import check_hessian
from .hqq import MAX_FACTOR, search_scale_and_zero


def search_with_hessian(
    weight: torch.Tensor,
    layout: WeightLayout,
    perm: torch.Tensor | None,
    hessian: torch.Tensor,
    name: str = "weight",
) -> QuantizedWeight:
    """Codes of a finite weight [N, K] (original column order), as gptq.quantize_with_hessian, without corrections.

    Raises QuantizeError: a Hessian that is misshapen, not finite or not positive definite, a scale out of range.
    """
    check_hessian(hessian, layout.in_features, name)
    blocks = []
    for s in layout.segments:
        columns = torch.arange(s.k0, s.k1) if perm is None else perm[s.k0 : s.k1].long()
        spec = BlockSpec(s.bits, s.group_size, s.zero, layout.scale_dtype)
        try:
            block = _search_segment(weight[s.n0 : s.n1], s, spec, hessian, columns.to(hessian.device))
        except QuantizeError as error:
            raise QuantizeError(f"{name}, rows {s.n0}..{s.n1}, columns {s.k0}..{s.k1}: {error}") from error
        blocks.append((s.n0, s.k0, block))
    return QuantizedWeight(tuple(blocks), perm)


def _search_segment(
    weight: torch.Tensor, segment: Segment, spec: BlockSpec, hessian: torch.Tensor, columns: torch.Tensor
) -> QuantizedBlock:
    """One segment of the rows `weight` [n, K]; columns: those of the segment, in the codes' order."""
    rows, size = len(weight), segment.group_size
    dtype = TORCH_DTYPES[spec.scale_dtype]
    codes = torch.empty(rows, segment.cols, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, segment.cols // size, dtype=dtype, device=weight.device)
    zeros = torch.empty_like(scales, dtype=torch.uint8 if spec.zero == "int" else dtype)
    step = max(1, CHUNK_WEIGHTS // size)
    for group in range(segment.cols // size):
        span = slice(group * size, (group + 1) * size)
        own = columns[span]
        factor = _group_factor(hessian, own)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            groups = weight[part][:, own.to(weight.device)].to(hessian.device, torch.float32)
            scale, zero = search_scale_and_zero(groups, spec, factor)
            codes[part, span] = encode(groups, scale, zero, spec.max_code).to(codes)
            scales[part, group : group + 1] = scale.to(scales)
            zeros[part, group : group + 1] = zero.to(zeros)
    return QuantizedBlock(spec.bits, codes, scales, None if spec.zero == "none" else zeros)


def _group_factor(hessian: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """F of the search for a group of columns. Raises QuantizeError."""
    if len(columns) > MAX_FACTOR:
        return hessian.diagonal()[columns].clamp(min=0).sqrt().float()
    factor, failed = torch.linalg.cholesky_ex(hessian[columns][:, columns].double())
    if int(failed):
        raise QuantizeError("the Hessian is not positive definite; add damping to its diagonal")
    return factor.float()
