"""Codes out of the 32-bit words of other formats.

    stream   32 codes in `bits` words, one behind the other from the lowest bit on; codes may lie across two words
    planar   32 codes in `bits` words: a plane of 4, 2 or 1 bits behind the other, the lowest bits of the codes first
             (GPTQModel's gptq_p)
    fields   32 // bits codes in each word from the lowest bit on, the rest of the bits unused

For 2, 4 and 8 bits all three are the same. Words [words, columns] hold codes [count, columns]: a code's words are in
one column.
"""

from __future__ import annotations

import torch

BLOCK = 32  # codes in `bits` whole words
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # widths, low bits first
PACKINGS = ("stream", "planar", "fields")


def words_for(count: int, bits: int, packing: str) -> int:
    """Words that `count` codes take."""
    return -(-count // (32 // bits)) if packing == "fields" else -(-count * bits // 32)


def unpack(words: torch.Tensor, bits: int, count: int, packing: str = "stream") -> torch.Tensor:
    """uint8 [count, columns] from int32 words [words_for(count, bits, packing), columns]."""
    if packing == "fields":
        return _fields(words, bits)[:count]
    short = -len(words) % bits
    if short:
        words = torch.cat([words, words.new_zeros(short, words.shape[1])])
    blocks = words.view(-1, bits, words.shape[1])
    out = torch.empty(len(blocks), BLOCK, words.shape[1], dtype=torch.uint8)
    code = _planar_code if packing == "planar" else _stream_code
    for index in range(BLOCK):
        out[:, index] = code(blocks, bits, index)
    return out.view(-1, words.shape[1])[:count]


def _fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    held = 32 // bits
    out = torch.empty(len(words), held, words.shape[1], dtype=torch.uint8)
    for index in range(held):
        out[:, index] = (words >> bits * index) & ((1 << bits) - 1)
    return out.view(-1, words.shape[1])


def _stream_code(blocks: torch.Tensor, bits: int, index: int) -> torch.Tensor:
    word, shift = divmod(bits * index, 32)
    value = blocks[:, word] >> shift
    held = 32 - shift
    if held < bits:  # an arithmetic shift brings copies of the sign bit in: they are cleared first
        value = (value & ((1 << held) - 1)) | (blocks[:, word + 1] << held)
    return value & ((1 << bits) - 1)


def _planar_code(blocks: torch.Tensor, bits: int, index: int) -> torch.Tensor:
    value = torch.zeros_like(blocks[:, 0])
    first = low = 0
    for width in PLANES[bits]:
        word, place = divmod(index, 32 // width)
        value |= ((blocks[:, first + word] >> width * place) & ((1 << width) - 1)) << low
        first += width
        low += width
    return value
