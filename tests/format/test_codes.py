"""The layout tables: every code has exactly one place, and the compiled header says the same."""

import pytest

from mpq_kernels.format import codes
from mpq_kernels.format.codes import (
    FORMATS,
    PLANE_WIDTHS,
    TILE_CODES,
    TILE_K,
    TILE_N,
    bit_index,
    row_position,
    word_index,
)
from mpq_kernels.format.kinds import KINDS

CELLS = [(n, k) for n in range(TILE_N) for k in range(TILE_K)]


@pytest.mark.parametrize("width", PLANE_WIDTHS)
def test_a_plane_holds_every_code_once_without_gaps(width):
    fields = {(word_index(width, n, k), bit_index(width, n, k)) for n, k in CELLS}
    assert len(fields) == TILE_CODES
    assert fields == {(word, bit) for word in range(128 * width) for bit in range(0, 32, width)}


def test_row_positions_are_a_permutation_in_lane_order():
    assert sorted(row_position(n) for n in range(TILE_N)) == list(range(TILE_N))
    # A lane (g, q) reads rows 16 t + 8 h + g, t fastest: its eight scales are neighbours.
    for g in range(8):
        rows = [16 * t + 8 * h + g for h in range(2) for t in range(4)]
        assert [row_position(n) for n in rows] == list(range(8 * g, 8 * g + 8))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f"{f.bits}bit")
def test_planes_add_up_and_shifts_place_them(fmt):
    assert sum(fmt.planes) == fmt.bits and list(fmt.planes) == sorted(fmt.planes, reverse=True)
    shifts = codes.plane_shifts(fmt.bits)
    covered = [bit for width, shift in zip(fmt.planes, shifts, strict=True) for bit in range(shift, shift + width)]
    assert sorted(covered) == list(range(fmt.bits))
    assert fmt.tile_words * 4 == 512 * fmt.bits


def test_layout_id_depends_on_the_tables(monkeypatch):
    assert codes._layout_id() == codes.LAYOUT_ID
    for change in (
        {"TILE_K": 32},
        {"KINDS": {name: kind for name, kind in KINDS.items() if name != "min"}},
        {"scale_block": lambda row_tile, group, groups: group * 3 + row_tile},
    ):
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setattr(codes, name, value)
            assert codes._layout_id() != codes.LAYOUT_ID


def test_compiled_parts_have_this_layout():
    import torch

    from mpq_kernels import _host  # noqa: F401
    from mpq_kernels.backends import ops  # noqa: F401

    assert _host.LAYOUT_ID == codes.LAYOUT_ID
    assert torch.ops.mpq.layout_id() == codes.LAYOUT_ID
