"""bf16: the dense model. Weights are dequantized in fp32 and rounded once, as `model.dequantize` does.

What is kept is written in bf16 too where it has the dtype of the model; what has another one (buffers in fp32) stays.
"""

from __future__ import annotations

from functools import partial

import torch

from ..format.float8 import from_float8
from ..format.reference import dequantize
from .form import Form
from .source import Linear, PackedSource

DTYPE = torch.bfloat16


def bf16_form(source: PackedSource) -> Form:
    """Everything can be written."""
    shapes: dict[str, tuple[int, ...]] = {
        each.name: (each.cols, each.rows) if each.transposed else (each.rows, each.cols) for each in source.linears
    }
    specs = {name: {f"{name}.weight": (DTYPE, shape)} for name, shape in shapes.items()}
    says = {name: f"bfloat16 {shape[0]} x {shape[1]}" for name, shape in shapes.items()}
    own = source.model.dtype
    key = "torch_dtype" if "torch_dtype" in source.checkpoint.config else "dtype"
    return Form(specs, partial(_make, source), says, {key: "bfloat16"}, lambda dtype: DTYPE if dtype == own else dtype)


def _make(source: PackedSource, linear: Linear) -> dict[str, torch.Tensor]:
    if linear.layout is None:
        read = source.checkpoint.read
        dense = from_float8(read(f"{linear.module}.qweight"), read(f"{linear.module}.scales"), DTYPE)
    else:
        dense = dequantize(source.weight(linear), DTYPE)
    return {f"{linear.name}.weight": dense.T.contiguous() if linear.transposed else dense}
