"""AWQ, the layout of AutoAWQ that is called gemm: 4 bits, one group size for the whole model.

    qweight int32 [K, N / 8]   qzeros int32 [groups, N / 8]   scales [groups, N]

In a word the rows of W have the order 0 2 4 6 1 3 5 7 of each eight. Source: autoawq 0.2.9 (awq.utils.packing_utils).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch

from ..files.safetensors import Spec
from .form import Form
from .integers import MIN_GROUP, Shape, Wanted, integers, pack_words, shapes_of
from .source import Linear, PackedSource

WANTED = Wanted("awq", (4,), (torch.float16, torch.bfloat16), permuted=False, rows=8)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq_form(source: PackedSource) -> Form:
    """Raises CheckpointError for weights that it cannot hold."""
    found = shapes_of(source, WANTED)
    size = math.gcd(*(shape.group for shape in found.values()))
    if size < MIN_GROUP:
        source.has_no([(name, f"has groups of {s.group}, and all have one size") for name, s in found.items()], "awq")
    shapes = {name: replace(shape, group=size) for name, shape in found.items()}
    specs = {linear.name: _specs(linear, shapes[linear.name]) for linear in source.linears}
    config = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": size,
        "zero_point": True,
        "modules_to_not_convert": list(source.checkpoint.packing.kept) or None,
    }
    says = {name: f"4 bits, groups of {size}" for name in shapes}
    return Form(specs, partial(_make, source, shapes), says, {"quantization_config": config})


def _specs(linear: Linear, shape: Shape) -> dict[str, Spec]:
    groups = linear.cols // shape.group
    return {
        f"{linear.name}.qweight": (torch.int32, (linear.cols, linear.rows // 8)),
        f"{linear.name}.qzeros": (torch.int32, (groups, linear.rows // 8)),
        f"{linear.name}.scales": (shape.scales, (groups, linear.rows)),
    }


def _make(source: PackedSource, shapes: dict[str, Shape], linear: Linear) -> dict[str, torch.Tensor]:
    made = integers(source.weight(linear), shapes[linear.name])
    return {
        f"{linear.name}.qweight": _words(made.codes),
        f"{linear.name}.qzeros": _words(made.zeros),
        f"{linear.name}.scales": made.scales.T.contiguous(),
    }


def _words(values: torch.Tensor) -> torch.Tensor:
    """int32 [columns, N / 8] of values [N, columns]."""
    ordered = values.view(-1, 8, values.shape[1])[:, list(ORDER)].reshape(values.shape)
    return pack_words(ordered.T, 4)
