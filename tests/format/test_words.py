"""Packing: C++ against torch, round trips, and nothing lost at odd sizes."""

import os

import pytest
import torch

from mpq_kernels.errors import FormatError
from mpq_kernels.format.codes import row_position
from mpq_kernels.format.weights import QuantizedBlock, QuantizedWeight
from mpq_kernels.format.words import PACKERS, pack_rows, pack_weight, unpack_weight
from tests.made.weights import BITS, SIZES, mixed_weight, random_weight, support_matrix


def test_worked_example_of_the_format_page():
    codes = torch.zeros(64, 64, dtype=torch.uint8)
    codes[13, 9] = 5
    packed = pack_weight(QuantizedWeight.uniform(QuantizedBlock(4, codes, torch.ones(64, 1))))
    data = packed.qweight.numpy().tobytes()
    assert data[320:324] == bytes.fromhex("00000050") and not any(data[:320]) and not any(data[324:])


def test_rows_of_scales_sit_at_their_positions():
    packed = pack_rows(torch.arange(64.0).view(64, 1))
    assert [packed[row_position(n)].item() for n in range(64)] == list(range(64))


def test_worked_example_of_scales():
    values = torch.zeros(80, 5)
    values[77, 2] = 1
    assert pack_rows(values).nonzero().tolist() == [[492]]


def test_the_scales_of_a_row_tile_are_one_piece():
    packed = pack_rows(torch.arange(130.0 * 3).view(130, 3))
    for tile, group in ((0, 0), (0, 2), (1, 1), (2, 0)):
        block = packed[(3 * tile + group) * 64 :][:64]
        assert block[row_position(1)].item() == (64 * tile + 1) * 3 + group


@pytest.mark.parametrize(("bits", "zero", "scale_dtype"), support_matrix())
def test_round_trip_and_both_packers_agree(bits, zero, scale_dtype):
    weight = random_weight(100, 96, bits, 32, zero, scale_dtype, permuted=True, seed=bits)
    packed, other = pack_weight(weight), pack_weight(weight, "torch")
    for name, tensor in packed.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name
    for method in PACKERS:
        assert_equal(unpack_weight(packed, method), weight)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", SIZES)
def test_odd_sizes_round_trip(n, k, bits):
    weight = random_weight(n, k, bits, seed=n + k)
    packed = pack_weight(weight)
    assert torch.equal(packed.qweight, pack_weight(weight, "torch").qweight)
    assert_equal(unpack_weight(packed), weight)
    assert packed.size().total_bytes == sum(t.numel() * t.element_size() for t in packed.tensors().values())


def test_segments_round_trip():
    weight = mixed_weight(permuted=True)
    assert_equal(unpack_weight(pack_weight(weight)), weight)
    assert_equal(unpack_weight(pack_weight(weight, "torch"), "torch"), weight)


def test_codes_that_are_a_strided_view():
    weight = random_weight(65, 128, 3)
    block = weight.blocks[0][2]
    wide = torch.zeros(65, 256, dtype=torch.uint8)
    wide[:, ::2] = block.codes
    view = QuantizedBlock(3, wide[:, ::2], block.scales, block.zeros)
    assert torch.equal(pack_weight(QuantizedWeight.uniform(view)).qweight, pack_weight(weight).qweight)


def test_unknown_method():
    with pytest.raises(FormatError, match="method='numba' is not one of"):
        pack_weight(random_weight(4, 4, 4), "numba")


@pytest.mark.parametrize("thread_count", [1, 2, 7])
def test_thread_count_does_not_change_words(thread_count, monkeypatch):
    weight = random_weight(300, 200, 7)
    expected = pack_weight(weight).qweight
    monkeypatch.setattr(os, "cpu_count", lambda: thread_count)
    assert torch.equal(pack_weight(weight).qweight, expected)


def assert_equal(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert len(a.blocks) == len(b.blocks) and (a.perm is None) == (b.perm is None)
    assert a.perm is None or torch.equal(a.perm, b.perm)
    for (n, k, x), (m, j, y) in zip(a.blocks, b.blocks, strict=True):
        assert (n, k, x.bits) == (m, j, y.bits)
        assert torch.equal(x.codes, y.codes) and torch.equal(x.scales, y.scales)
        assert (x.zeros is None) == (y.zeros is None) and (x.zeros is None or torch.equal(x.zeros, y.zeros))
