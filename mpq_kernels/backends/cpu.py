"""The C++ kernels of csrc/cpu: AVX-512, AVX2 or portable, chosen at run time; every width, group and segment."""

from __future__ import annotations

import torch

from . import ops  # noqa: F401  (registers the operators)
from .base import Backend

BACKEND = Backend(
    name="cpu",
    summary="C++ kernels with fp32 accumulation on torch's threads",
    devices=("cpu",),
    linear=torch.ops.mpq.linear.default,
    grouped=torch.ops.mpq.grouped_linear.default,
    dequantize=torch.ops.mpq.dequantize.default,
    embedding=torch.ops.mpq.embedding.default,
    linear_int8=torch.ops.mpq.linear_int8.default,
    grouped_int8=torch.ops.mpq.grouped_linear_int8.default,
    why_unavailable=lambda: None,  # ops refuses to import when the compiled part is absent or from another build
)
