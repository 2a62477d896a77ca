"""HQQ: the library's own safetensors, and those of transformers. Groups along K (axis=1) alone.

    W_q      codes of the groups [N * groups, G], packed along the first dimension: `held` of them in an element, one
             run of rows behind the other, the first run in the highest bits
    scale, zero [N * groups, 1], floats                 W = (code - zero) * scale
    shape (N, K), nbits, group_size, axis, packing      each a tensor of its own; text as the numbers of its letters

The library computes in fp16 or bf16 and rounds twice. What is imported rounds twice as well, in fp32: it is what the
library gives with compute_dtype=torch.float32, bit for bit. Source: hqq 0.2.8 (core.quantize, core.bitpack).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.shards import StoredTensor, TensorFiles
from ..files.strict import short
from ..format.weights import QuantizedWeight
from .columns import Columns
from .stored import FLOATS, Stored
from .weight import ForeignWeight, Found

CODES = "W_q"
MAX_WORD = 64  # letters of a text


@dataclass(frozen=True)
class Packing:
    """held: codes in an element of `dtype`. bits: of the field of each."""

    dtype: torch.dtype
    held: int
    bits: int


PACKINGS = {
    "8bit_u8": Packing(torch.uint8, 1, 8),
    "4bit_u8": Packing(torch.uint8, 2, 4),
    "3bit_32": Packing(torch.int32, 10, 3),
    "2bit_u8": Packing(torch.uint8, 4, 2),
    "1bit_u8": Packing(torch.uint8, 8, 1),
}
PARTS = (
    *("nbits", "group_size", "shape", "scale", "zero", "axis", "packing", "unpack_view_dtype", "view_as_float"),
    *("quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config"),
    *("channel_wise", "optimize", "round_zero"),
)


def is_hqq(stored: Stored) -> bool:
    """Whether a config is one of HQQ, or the tensors are."""
    return stored.method == "hqq" or (not stored.method and any(True for _ in stored.modules(CODES)))


def read_hqq(stored: Stored) -> Found:
    """Every quantized weight. Raises CheckpointError."""
    found = Found()
    for name, codes in stored.modules(CODES):
        found.add(_weight(stored, name, codes))
    if not found.weights:
        raise CheckpointError(f"{stored.path}: no file holds a {CODES}; nothing is quantized in the form of HQQ")
    return found


def _weight(stored: Stored, name: str, codes: StoredTensor) -> ForeignWeight:
    axis, size = _number(stored, name, "axis"), _number(stored, name, "group_size")
    if axis != 1:
        raise CheckpointError(
            f"{codes}: axis={axis}: its groups are columns of several rows, and here a group is a part of one row; "
            "quantize with axis=1"
        )
    for leaf in ("quant_scale", "quant_zero"):
        if stored.optional(name, leaf) is not None and _number(stored, name, leaf):
            raise CheckpointError(f"{codes}: {leaf}: scales and zeros that are quantized themselves are not imported")
    word = "".join(chr(min(max(each, 0), 127)) for each in _values(stored, name, "packing", MAX_WORD))
    packing = PACKINGS.get(word)
    if packing is None:
        raise CheckpointError(f"{codes}: packing={short(word)} is not one of {', '.join(PACKINGS)}")
    shape = [int(each) for each in _values(stored, name, "shape", 2)]
    if len(shape) != 2 or min(shape) < 1 or size < 1 or shape[1] % size:
        raise CheckpointError(f"{codes}: shape={shape} with groups of {size}: a group must be a part of one row")
    rows, cols = shape
    lines = rows * cols // size
    scale, zero = stored.part(name, "scale"), stored.part(name, "zero")
    held = (-(-lines // packing.held), size)
    counts = {scale.shape, zero.shape}
    if not counts <= {(lines, 1), (lines,), (1, 1), (1,), ()} or {scale.dtype, zero.dtype} - set(FLOATS):
        raise CheckpointError(f"{scale}: with {zero}, these are no scales and zeros of {lines} groups")
    if codes.entry.nbytes != held[0] * size * packing.dtype.itemsize:
        raise CheckpointError(f"{codes}: is not {rows} x {cols} codes, {word}")
    nbits = stored.part(name, "nbits")
    said = float(stored.files.read(nbits.name).reshape(-1)[0]) if nbits.entry.nbytes else 0.0
    bits = int(said) if said in (1, 2, 3, 4, 5, 6, 7, 8) and said <= packing.bits else packing.bits
    columns = Columns.uniform(cols, size, str(codes))
    dtype = scale.dtype if scale.dtype == zero.dtype else torch.float32
    layout = columns.layout(rows, bits, "float", dtype)
    parts = (codes, *(t for t in (stored.optional(name, leaf) for leaf in PARTS) if t is not None))
    make = partial(_make, codes, scale, zero, packing, bits, columns, dtype, (rows, cols))
    return ForeignWeight(name, parts, columns, layout, f"hqq, {bits} bits, {columns.in_words()}, float zeros", make)


def _values(stored: Stored, name: str, leaf: str, most: int) -> list[Any]:
    """The few integers of a small tensor."""
    tensor = stored.part(name, leaf)
    values = stored.files.read(tensor.name)
    if values.is_floating_point() or values.is_complex() or not 0 < values.numel() <= most:
        raise CheckpointError(f"{tensor}: is not 1 to {most} integers")
    return values.reshape(-1).tolist()


def _number(stored: Stored, name: str, leaf: str) -> int:
    return int(_values(stored, name, leaf, 1)[0])


def _make(
    codes: StoredTensor,
    scale: StoredTensor,
    zero: StoredTensor,
    packing: Packing,
    bits: int,
    columns: Columns,
    dtype: torch.dtype,
    shape: tuple[int, int],
    files: TensorFiles,
) -> QuantizedWeight:
    rows, cols = shape
    size = columns.runs[0].size
    lines = rows * cols // size
    elements = files.read(codes.name).view(packing.dtype).reshape(-1, size)
    out = torch.empty(packing.held, len(elements), size, dtype=torch.uint8)
    for index in range(packing.held):  # the first run is in the highest bits
        out[index] = (elements >> packing.bits * (packing.held - 1 - index)) & ((1 << packing.bits) - 1)
    unpacked = out.view(-1, size)[:lines].reshape(rows, cols)
    scales, zeros = (
        files.read(each.name).reshape(-1, 1).expand(lines, 1).reshape(rows, -1).to(dtype) for each in (scale, zero)
    )
    return columns.weight(bits, unpacked, scales, zeros)
