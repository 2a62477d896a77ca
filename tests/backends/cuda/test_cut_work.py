"""Where blocks begin: csrc/cuda/cut_work.cpp, by the program of benchmarks/gpu/model/problem.py. No GPU is needed."""

from dataclasses import replace

import pytest

from benchmarks.gpu.model.machines import MACHINES
from benchmarks.gpu.model.problem import Problem, prepare
from benchmarks.layers.shapes import add_shape

H200 = MACHINES["h200"]


def cuts(shape: str, bits: str, tokens: int, blocks: int = 132, group_size: int = 128):
    """Cuts of a launch with so many blocks, and supertiles along K."""
    assert add_shape(shape)
    problem = Problem(shape, bits, tokens, group_size)
    return prepare(problem, replace(H200, multiprocessors=blocks)).cuts, -(-problem.layout.in_features // 64)


def tiles(begin, end, k_tiles):
    """Supertiles of one row tile that a block has."""
    return (end.group - begin.group) * k_tiles + end.tile - begin.tile


@pytest.mark.parametrize(
    "shape,bits,tokens,blocks,parts",
    [
        ("8192x8192", "4", 1, 132, 1),
        ("8192x8192", "8", 8, 132, 2),  # row groups of 128 rows
        ("8192x8192", "3", 16, 132, 4),  # of 256
        ("4096x4096", "2", 1, 132, 2),
        ("llama-8b-qkv", "4", 1, 101, 1),  # three bands of one width
        ("100x640", "4", 1, 10, 5),  # the last row group is not whole
        ("64x640", "1", 1, 5, 3),  # 10 supertiles are 3 units of up to 4: no more blocks than units
    ],
)
def test_like_row_groups_are_cut_into_equal_parts(shape, bits, tokens, blocks, parts):
    found, k_tiles = cuts(shape, bits, tokens, blocks)
    unit = {"2": 4, "1": 4, "3": 2, "4": 2}.get(bits, 1)
    assert len(found) - 1 == found[-1].group * parts
    for begin, end in zip(found, found[1:], strict=False):
        # A part of one row group, not across a border, as long as the others but for a unit.
        assert end.group == begin.group or (end.group == begin.group + 1 and end.tile == 0)
        assert abs(tiles(begin, end, k_tiles) - k_tiles / parts) < unit
        assert begin.tile % unit == 0
    inside = [i for i, cut in enumerate(found[:-1]) if cut.tile]
    assert all(found[i].last - found[i].first == parts - 1 for i in inside)


@pytest.mark.parametrize(
    "shape,bits,blocks",
    [
        ("llama-8b-qkv", "4|3|8", 132),  # bytes, not tiles, are shared out
        ("6144x4096", "4", 132),  # 96 row groups: one part each would leave 36 blocks idle
        ("14336x4096", "4", 132),  # 224
    ],
)
def test_all_others_are_cut_into_equal_bytes(shape, bits, blocks):
    found, k_tiles = cuts(shape, bits, 1, blocks)
    assert len(found) == blocks + 1
    assert any(cut.tile % (k_tiles // 4) for cut in found)
    lengths = {tiles(a, b, k_tiles) for a, b in zip(found, found[1:], strict=False)}
    if "|" not in bits:
        assert max(lengths) - min(lengths) <= 4
