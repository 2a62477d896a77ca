"""Codes into kernel-ready words and back.

`pack_weight` and `unpack_weight` run in C++ on all cores; `method="torch"` is the same rule in index arithmetic on any
device, which the tests hold against the C++ and which unpacks weights that lie on a device. Both follow codes.py.

    codes [n, k] -> supertiles [row tiles][column tiles][64][64] -> one run of words for each plane
"""

from __future__ import annotations

import functools
import os

import torch

from ..errors import FormatError, UnsupportedError
from .codes import FORMATS, LAYOUT_ID, TILE_CODES, TILE_K, TILE_N, bit_index, plane_shifts, word_index
from .layout import Segment, ceil_div
from .weights import PackedWeight, QuantizedBlock, QuantizedWeight

try:
    from .. import _host
except ImportError as error:
    raise UnsupportedError(
        f"mpq_kernels._host, the compiled part, cannot be imported ({error}): build it with `pip install .` in the "
        "source tree (a C++20 compiler is enough)"
    ) from error
if _host.LAYOUT_ID != LAYOUT_ID:
    raise UnsupportedError(
        f"the compiled part was built for layout {_host.LAYOUT_ID}, this package has {LAYOUT_ID}: build it again "
        "(`pip install .`)"
    )


def pack_weight(weight: QuantizedWeight, method: str = "cpp") -> PackedWeight:
    """Kernel-ready form of quantized codes, on the CPU ("torch": on the device of the codes).

    Raises FormatError when blocks do not tile a weight or `method` is neither "cpp" nor "torch".
    """
    if method not in PACKERS:
        raise FormatError(f"method={method!r} is not one of {sorted(PACKERS)}")
    layout = weight.layout
    pack_codes = PACKERS[method][0]
    blocks = [block for _, _, block in weight.blocks]
    zeros = [pack_rows(b.zeros) for b in blocks if b.zeros is not None]
    qweight = torch.cat([pack_codes(b.codes, b.bits) for b in blocks])
    scales = torch.cat([pack_rows(b.scales) for b in blocks])
    moved = (lambda t: t) if method == "torch" else (lambda t: t.cpu())
    return PackedWeight(
        layout,
        qweight,
        moved(scales),
        moved(torch.cat(zeros)) if zeros else None,
        moved(weight.perm.to(torch.int32)) if weight.perm is not None else None,
    )


def unpack_weight(weight: PackedWeight, method: str | None = None) -> QuantizedWeight:
    """Inverse of `pack_weight`. `method` None: C++ on the CPU, torch elsewhere."""
    name = method or ("cpp" if weight.qweight.device.type == "cpu" else "torch")
    unpack_codes = PACKERS[name][1]
    blocks = []
    for segment, start in zip(weight.layout.segments, weight.layout.offsets, strict=True):
        words = weight.qweight.narrow(0, start.planes[0], segment.words)
        codes = unpack_codes(words, segment)
        scales = unpack_rows(weight.scales.narrow(0, start.scales, segment.scale_count), segment)
        zeros = None
        if weight.zeros is not None and segment.zero_count:
            zeros = unpack_rows(weight.zeros.narrow(0, start.zeros, segment.zero_count), segment)
        blocks.append((segment.n0, segment.k0, QuantizedBlock(segment.bits, codes, scales, zeros, segment.zero)))
    return QuantizedWeight(tuple(blocks), weight.perm)


def pack_rows(values: torch.Tensor) -> torch.Tensor:
    """Scales or zeros [n, groups] -> flat [row tiles][groups][64], rows of a tile in position order, padding zero."""
    n, groups = values.shape
    tiles = ceil_div(n, TILE_N)
    padded = values.new_zeros(tiles * TILE_N, groups)
    padded[:n] = values
    # row = (tile, t, h, g) -> position (tile, g, h, t), which is codes.row_position
    return padded.view(tiles, 4, 2, 8, groups).permute(0, 4, 3, 2, 1).reshape(-1)


def unpack_rows(flat: torch.Tensor, segment: Segment) -> torch.Tensor:
    """Inverse of pack_rows: [n, groups]."""
    tiles = segment.row_tiles
    rows = flat.view(tiles, segment.groups, 8, 2, 4).permute(0, 4, 3, 2, 1)
    return rows.reshape(tiles * TILE_N, segment.groups)[: segment.rows].contiguous()


def _pack_codes_cpp(codes: torch.Tensor, bits: int) -> torch.Tensor:
    array = codes.cpu().contiguous().numpy()
    return torch.from_numpy(_host.pack_codes(array, bits, os.cpu_count() or 1))


def _unpack_codes_cpp(words: torch.Tensor, segment: Segment) -> torch.Tensor:
    array = words.cpu().contiguous().numpy()
    threads = os.cpu_count() or 1
    return torch.from_numpy(_host.unpack_codes(array, segment.bits, segment.rows, segment.cols, threads))


def _pack_codes_torch(codes: torch.Tensor, bits: int) -> torch.Tensor:
    n, k = codes.shape
    row_tiles, col_tiles = ceil_div(n, TILE_N), ceil_div(k, TILE_K)
    padded = codes.new_zeros(row_tiles * TILE_N, col_tiles * TILE_K)
    padded[:n, :k] = codes
    tiles = padded.view(row_tiles, TILE_N, col_tiles, TILE_K).transpose(1, 2)
    tiles = tiles.reshape(row_tiles * col_tiles, TILE_CODES).long()
    planes = []
    for width, shift in zip(FORMATS[bits].planes, plane_shifts(bits), strict=True):
        word, bit = code_tables(width, codes.device)
        field = ((tiles >> shift) & ((1 << width) - 1)) << bit
        words = torch.zeros(len(tiles), 128 * width, dtype=torch.int64, device=codes.device)
        words.scatter_add_(1, word.expand_as(field), field)  # fields do not overlap, so adding is or-ing
        planes.append(words.reshape(-1))
    words = torch.cat(planes)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _unpack_codes_torch(words: torch.Tensor, segment: Segment) -> torch.Tensor:
    tiles = segment.row_tiles * segment.col_tiles
    codes = torch.zeros(tiles, TILE_CODES, dtype=torch.int32, device=words.device)
    start = 0
    for width, count in zip(FORMATS[segment.bits].planes, segment.plane_words(), strict=True):
        word, bit = code_tables(width, words.device)
        plane = words.narrow(0, start, count).view(tiles, 128 * width)
        # An arithmetic shift brings copies of the sign bit in above the field; the mask removes them.
        field = (plane[:, word] >> bit.int()) & ((1 << width) - 1)
        codes = (codes << width) | field
        start += count
    matrix = codes.view(segment.row_tiles, segment.col_tiles, TILE_N, TILE_K).transpose(1, 2)
    matrix = matrix.reshape(segment.row_tiles * TILE_N, segment.col_tiles * TILE_K)
    return matrix[: segment.rows, : segment.cols].to(torch.uint8)


@functools.cache
def code_tables(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(word, bit) of every code of a supertile in row-major order, int64 [4096] each."""
    cells = [(n, k) for n in range(TILE_N) for k in range(TILE_K)]
    word = torch.tensor([word_index(width, n, k) for n, k in cells], device=device)
    bit = torch.tensor([bit_index(width, n, k) for n, k in cells], device=device)
    return word, bit


PACKERS = {"cpp": (_pack_codes_cpp, _unpack_codes_cpp), "torch": (_pack_codes_torch, _unpack_codes_torch)}
