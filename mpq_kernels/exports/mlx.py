"""MLX, affine: 2, 3, 4, 5, 6 and 8 bits in groups of 32, 64 or 128, widths of single modules under their names.

    <module>.weight uint32 [N, K * bits / 32]   .scales, .biases [N, groups]      W[n, k] = code * scale + bias

    kind                     bias                    dtype of scales and biases
    min                      the minimum             as it is
    none                     -2^(bits-1) * scale     as it is: a power of two loses nothing
    half, int, 16-bit scales -zero * scale           fp32: products and sums of 16-bit scales are exact in it

Source: mlx 0.32 (mlx.core.quantize), mlx_lm.utils.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..files.safetensors import Spec
from ..format.weights import TORCH_DTYPES, QuantizedBlock
from ..format.words import unpack_weight
from .form import Form
from .integers import check_values, pack_words, words_for
from .source import Linear, PackedSource

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (128, 64, 32)
EXACT = ("min", "none")  # in the dtype of their scales
WIDENED = ("half", "int")


@dataclass(frozen=True)
class Shape:
    """Of one weight. dtype: of scales and biases."""

    bits: int
    group: int
    dtype: torch.dtype


def mlx_form(source: PackedSource) -> Form:
    """Raises CheckpointError for weights that it cannot hold."""
    found = {linear.name: _shape(linear) for linear in source.linears}
    source.has_no([(name, why) for name, why in found.items() if isinstance(why, str)], "mlx")
    shapes = {name: shape for name, shape in found.items() if isinstance(shape, Shape)}
    specs = {linear.name: _specs(linear, shapes[linear.name]) for linear in source.linears}
    own: dict[str, dict[str, Any]] = {n: {"group_size": s.group, "bits": s.bits} for n, s in shapes.items()}
    common = dict(Counter(tuple(each.items()) for each in own.values()).most_common(1)[0][0])
    said = {**common, "mode": "affine"} | {name: each for name, each in own.items() if each != common}
    says = {name: f"{s.bits} bits, groups of {s.group}, {str(s.dtype)[6:]} scales" for name, s in shapes.items()}
    config = {"quantization": said, "quantization_config": said}
    return Form(specs, partial(_make, source, shapes), says, config)


def _shape(linear: Linear) -> Shape | str:
    layout = linear.layout
    if layout is None:
        return "is stored in float8"
    if ".experts." in linear.name:
        return "is an expert, and MLX has those of a layer in one tensor (switch_mlp)"
    widths, kinds = sorted({s.bits for s in layout.segments}), {s.zero for s in layout.segments}
    if len(widths) > 1:
        return (
            f"has {' and '.join(map(str, widths))} bits, and a weight has one width there: plan with "
            "`mpq plan allocate --granularity linear`"
        )
    if widths[0] not in BITS:
        return f"has {widths[0]} bits, and mlx holds {', '.join(map(str, BITS))}"
    if layout.permuted:
        return "has reordered columns (act-order), for which there is no place there"
    own = math.gcd(*(s.group_size for s in layout.segments))
    group = next((size for size in GROUPS if own % size == 0), None)
    if group is None:
        return f"has groups of {own}, and mlx holds 32, 64, 128: plan with --group-size 64"
    dtype = TORCH_DTYPES[layout.scale_dtype]
    if kinds - {*EXACT, *WIDENED} or (dtype == torch.float32 and kinds - {"min"}):
        return f"has zeros of the kind {sorted(kinds)[0]} with scales in {layout.scale_dtype}: plan with --zero min"
    return Shape(widths[0], group, torch.float32 if kinds - {*EXACT} else dtype)


def _specs(linear: Linear, shape: Shape) -> dict[str, Spec]:
    grouped = (shape.dtype, (linear.rows, linear.cols // shape.group))
    return {
        f"{linear.name}.weight": (torch.uint32, (linear.rows, words_for(linear.cols, shape.bits))),
        f"{linear.name}.scales": grouped,
        f"{linear.name}.biases": grouped,
    }


def _make(source: PackedSource, shapes: dict[str, Shape], linear: Linear) -> dict[str, torch.Tensor]:
    shape = shapes[linear.name]
    codes = torch.empty(linear.rows, linear.cols, dtype=torch.uint8)
    scales = torch.empty(linear.rows, linear.cols // shape.group, dtype=shape.dtype)
    biases = torch.empty_like(scales)
    for n0, k0, block in unpack_weight(source.weight(linear)).blocks:
        n, k = block.codes.shape
        codes[n0 : n0 + n, k0 : k0 + k] = block.codes
        place = (slice(n0, n0 + n), slice(k0 // shape.group, (k0 + k) // shape.group))
        times = block.group_size // shape.group
        scales[place] = block.scales.repeat_interleave(times, dim=1).to(shape.dtype)
        biases[place] = _biases(block, shape.dtype).repeat_interleave(times, dim=1)
    return {
        f"{linear.name}.weight": pack_words(codes, shape.bits).view(torch.uint32),
        f"{linear.name}.scales": scales,
        f"{linear.name}.biases": check_values(linear.name, biases),
    }


def _biases(block: QuantizedBlock, dtype: torch.dtype) -> torch.Tensor:
    if block.zero == "min":
        assert block.zeros is not None
        return block.zeros.to(dtype)
    zero = block.kind.zero(block.bits, None if block.zeros is None else block.zeros.to(dtype))
    return -zero * block.scales.to(dtype)
