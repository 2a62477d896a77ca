"""The CUDA kernels of csrc/cuda: tensor cores, every width, group and segment, compute capability 8.0 and later."""

from __future__ import annotations

import torch

from .. import cuda_ops
from .base import Backend

BACKEND = Backend(
    name="cuda",
    summary="CUDA kernels on packed weights; a dense product for many tokens",
    devices=("cuda",),
    linear=torch.ops.mpq.linear.default,
    grouped=torch.ops.mpq.grouped_linear.default,
    dequantize=torch.ops.mpq.dequantize.default,
    available=cuda_ops.why_not,
)
