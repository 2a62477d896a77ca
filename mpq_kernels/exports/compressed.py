"""compressed-tensors: pack-quantized, one config group for each width, group size and symmetry.

    weight_packed int32 [N, words along K]   weight_scale [N, groups]   weight_shape int64 [2] = (N, K)
    weight_zero_point int32 [words along N, groups], where there are any   weight_g_idx int32 [K], where reordered

Its codes are signed, and are packed with 2^(bits-1) added: as ours. Source: compressed-tensors 0.20.0
(compressors.pack_quantized, quantization.quant_args).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..files.safetensors import Spec
from .form import Form
from .fused import unlike
from .integers import Integers, Shape, Wanted, integers, pack_words, shapes_of, words_for
from .source import Linear, PackedSource

WANTED = Wanted("compressed-tensors", range(1, 9), (torch.float16, torch.bfloat16, torch.float32), permuted=True)


def compressed_form(source: PackedSource) -> Form:
    """Raises CheckpointError for weights that it cannot hold."""
    shapes = shapes_of(source, WANTED)
    specs = {linear.name: _specs(linear, shapes[linear.name]) for linear in source.linears}
    groups: dict[str, dict[str, Any]] = {}
    for linear in source.linears:
        weights = _weights(linear, shapes[linear.name])
        key = "_".join(map(str, weights.values()))
        group = groups.setdefault(key, {"targets": [], "weights": weights, "format": "pack-quantized"})
        group["targets"].append(linear.name)
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": group | {"input_activations": None, "output_activations": None}
            for index, group in enumerate(groups.values())
        },
        "ignore": list(source.checkpoint.packing.kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    says = {name: _says(shape) for name, shape in shapes.items()}
    make = partial(_make, source, shapes)
    return Form(specs, make, says, {"quantization_config": config}, notes=unlike(source, shapes))


def _weights(linear: Linear, shape: Shape) -> dict[str, Any]:
    grouped = shape.group < linear.cols
    return {
        "num_bits": shape.bits,
        "type": "int",
        "symmetric": shape.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": shape.group if grouped else None,
        "actorder": "group" if shape.permuted else None,
        "dynamic": False,
        "observer": "minmax",
    }


def _says(shape: Shape) -> str:
    return f"{shape.bits} bits, groups of {shape.group}" + (", reordered columns" if shape.permuted else "")


def _specs(linear: Linear, shape: Shape) -> dict[str, Spec]:
    groups, lead = linear.cols // shape.group, f"{linear.name}.weight_"
    specs: dict[str, Spec] = {
        f"{lead}packed": (torch.int32, (linear.rows, words_for(linear.cols, shape.bits))),
        f"{lead}scale": (shape.scales, (linear.rows, groups)),
        f"{lead}shape": (torch.int64, (2,)),
    }
    if not shape.symmetric:
        specs[f"{lead}zero_point"] = (torch.int32, (words_for(linear.rows, shape.bits), groups))
    if shape.permuted:
        specs[f"{lead}g_idx"] = (torch.int32, (linear.cols,))
    return specs


def _make(source: PackedSource, shapes: dict[str, Shape], linear: Linear) -> dict[str, torch.Tensor]:
    shape = shapes[linear.name]
    made: Integers = integers(source.weight(linear), shape)
    tensors = {
        "packed": pack_words(made.codes, shape.bits),
        "scale": made.scales,
        "shape": torch.tensor([linear.rows, linear.cols]),
        "zero_point": pack_words(made.zeros.T, shape.bits).T.contiguous(),
        "g_idx": made.g_idx,
    }
    named = {f"{linear.name}.weight_{key}": value for key, value in tensors.items()}
    return {name: named[name] for name in _specs(linear, shape)}
