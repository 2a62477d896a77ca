"""Blocks of codes as operands of MatMulNBits, ONNX Runtime's own product with weights of 2, 4 and 8 bits.

    B            uint8 [N, blocks, block_size * bits / 8]   codes along K, the first in the lowest bits
    scales       float [N * blocks]
    zero_points  uint8 [N, ceil(blocks * bits / 8)]         packed as B; absent: 2^(bits - 1)

A group is one block, or several with equal scales. The last block of a group over all columns is padded with codes that
multiply nothing.
Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

import numpy as np

from ..format.codes import FORMATS
from ..format.weights import QuantizedBlock

BITS = (2, 4, 8)
LEAST_BLOCK, LARGEST_BLOCK = 16, 256  # larger blocks are refused for 2 bits


def why_not(block: QuantizedBlock) -> str | None:
    """Why a block cannot be multiplied so with exactly its values; None where it can."""
    if block.bits not in BITS:
        return f"MatMulNBits has no {block.bits}-bit codes"
    if block_size(block) is None:
        return f"MatMulNBits has no groups of {block.group_size}, only multiples of {LEAST_BLOCK}"
    if block.zero == "none":
        return None  # 2^(bits - 1), for the widths above
    if block.zero != "int" or block.zeros is None:
        return f"MatMulNBits is not exact with zeros of kind {block.zero}"
    if int(block.zeros.max()) > FORMATS[block.bits].max_code:
        return f"MatMulNBits has no zero of {int(block.zeros.max())} for {block.bits}-bit codes"
    return None


def block_size(block: QuantizedBlock) -> int | None:
    """MatMulNBits' block for the groups of this one, which are whole blocks of it; None when there is none."""
    cols, group = block.codes.shape[1], block.group_size
    size = 1 << (cols - 1).bit_length() if group == cols else group & -group
    size = max(LEAST_BLOCK, size) if group == cols else size
    return min(size, LARGEST_BLOCK) if size >= LEAST_BLOCK else None


def operands(block: QuantizedBlock) -> dict[str, np.ndarray]:
    """B, scales and, where they are stored, zero_points."""
    size = block_size(block)
    assert size is not None, "why_not() was not asked"
    codes, scales = block.codes.numpy(), block.scales.float().numpy()
    rows, cols = codes.shape
    blocks, repeats = -(-cols // size), -(-block.group_size // size)
    padded = np.zeros((rows, blocks * size), np.uint8)
    padded[:, :cols] = codes
    words = pack(padded, block.bits).reshape(rows, blocks, -1)
    found = {"B": words, "scales": scales.repeat(repeats, axis=1).reshape(-1)}
    if block.zeros is not None:
        per_byte = 8 // block.bits
        zeros = np.zeros((rows, -(-blocks // per_byte) * per_byte), np.uint8)
        zeros[:, :blocks] = block.zeros.numpy().repeat(repeats, axis=1)
        found["zero_points"] = pack(zeros, block.bits)
    return found


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, n] below 2^bits -> uint8 [rows, n * bits / 8], the first of a byte in its lowest bits."""
    per_byte = 8 // bits
    parts = values.reshape(len(values), -1, per_byte)
    packed = np.zeros(parts.shape[:2], np.uint8)
    for i in range(per_byte):
        packed |= parts[:, :, i] << (bits * i)
    return packed
