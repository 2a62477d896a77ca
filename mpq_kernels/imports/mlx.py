"""MLX: what `mlx_lm.convert -q` writes, affine, 2, 3, 4, 5, 6 and 8 bits.

    <module>.weight uint32 [N, K * bits / 32], a stream of codes (words.py)   .scales, .biases [N, groups]

    W[n, k] = code * scale + bias

config.json has the width and the group under `quantization`, and others for single modules under their names. MLX
computes in the dtype of the scales and rounds twice. What is imported rounds twice as well, in fp32: it is what
`mx.dequantize` gives with scales and biases as fp32, bit for bit. Source: mlx 0.32 (mlx.core.quantize, dequantize).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ..errors import CheckpointError
from ..files.shards import StoredTensor, TensorFiles
from ..files.strict import short
from ..format.weights import QuantizedWeight
from .columns import Columns
from .stored import FLOATS, Stored, check_matrix
from .weight import ForeignWeight, Found
from .words import unpack, words_for

BITS = (2, 3, 4, 5, 6, 8)
AFFINE = "affine"


def is_mlx(stored: Stored) -> bool:
    """Whether a config has a width and no method, and tensors are those of MLX."""
    said = stored.quantization
    return not stored.method and "group_size" in said and any(True for _ in _modules(stored))


def read_mlx(stored: Stored) -> Found:
    """Every quantized weight. Raises CheckpointError."""
    found = Found()
    for name, codes in _modules(stored):
        found.add(_weight(stored, name, codes))
    if not found.weights:
        raise CheckpointError(f"{stored.path}: no file holds words (uint32) with scales; nothing is of MLX's form")
    return found


def _modules(stored: Stored) -> Iterator[tuple[str, StoredTensor]]:
    for name, tensor in stored.modules("weight"):
        if tensor.dtype == torch.uint32 and f"{name}.scales" in stored.tensors:
            yield name, tensor


def _weight(stored: Stored, name: str, codes: StoredTensor) -> ForeignWeight:
    said = stored.quantization
    own = said.get(name)
    said = said | own if isinstance(own, dict) else said
    mode = said.get("mode", AFFINE)
    if mode != AFFINE:
        raise CheckpointError(f"{codes}: mode={short(mode)}: only affine codes are imported, no floats of few bits")
    if len(codes.shape) == 3:
        raise CheckpointError(
            f"{codes}: experts that are stored in one tensor, as MLX names them (switch_mlp), are not known to "
            "transformers; convert the checkpoint that they come from"
        )
    bits, size = said.get("bits"), said.get("group_size")
    rows, words = check_matrix(codes, (torch.uint32,), "MLX's codes")
    scales, biases = stored.part(name, "scales"), stored.part(name, "biases")
    held, groups = check_matrix(scales, FLOATS, "MLX's scales")
    if type(bits) is not int or bits not in BITS or type(size) is not int or size < 1:
        raise CheckpointError(f"{codes}: bits={short(bits)}, group_size={short(size)} are none of MLX's")
    cols = groups * size
    if (
        held != rows
        or words_for(cols, bits, "stream") != words
        or (biases.shape, biases.dtype)
        != (
            scales.shape,
            scales.dtype,
        )
    ):
        raise CheckpointError(
            f"{codes}: with {scales} and {biases}, these are no words of {bits} bits in groups of {size}"
        )
    columns = Columns.uniform(cols, size, str(codes))
    layout = columns.layout(rows, bits, "min", scales.dtype)
    make = partial(_make, codes, scales, biases, bits, columns)
    return ForeignWeight(
        name, (codes, scales, biases), columns, layout, f"mlx, {bits} bits, {columns.in_words()}", make
    )


def _make(
    codes: StoredTensor, scales: StoredTensor, biases: StoredTensor, bits: int, columns: Columns, files: TensorFiles
) -> QuantizedWeight:
    words = files.read(codes.name).view(torch.int32).T.contiguous()
    unpacked = unpack(words, bits, columns.runs[-1].k1).T.contiguous()
    return columns.weight(bits, unpacked, files.read(scales.name), files.read(biases.name), "min")
