"""Parts cut out of packed weights are the parts of what they dequantize to, bit for bit."""

import pytest
import torch

from mpq_kernels.errors import FormatError
from mpq_kernels.format.codes import FORMATS
from mpq_kernels.format.cut import cover_columns, cover_rows, cut_weight, stack_weights, why_not_stacked
from mpq_kernels.format.kinds import ZERO_KINDS
from mpq_kernels.format.reference import dequantize
from mpq_kernels.format.words import pack_weight
from tests.made.weights import mixed_weight, random_weight


def same(part, whole, rows, columns):
    return torch.equal(dequantize(part), dequantize(whole)[slice(*rows), slice(*columns)])


@pytest.mark.parametrize("zero", ZERO_KINDS)
@pytest.mark.parametrize("bits", sorted(FORMATS))
def test_every_width_and_kind(bits, zero):
    whole = pack_weight(random_weight(200, 320, bits, 32, zero, "bfloat16"))
    for rows in ((0, 64), (64, 200), (0, 200), (128, 192)):
        for columns in ((0, 64), (64, 320), (128, 256), (0, 320)):
            part = cut_weight(whole, rows, columns)
            assert part.layout.out_features == rows[1] - rows[0]
            assert same(part, whole, rows, columns)


@pytest.mark.parametrize("rows", [(0, 70), (0, 200), (70, 134), (134, 199), (198, 200), (3, 69), (64, 199)])
@pytest.mark.parametrize("columns", [(0, 320), (0, 64), (64, 256), (100, 190), (192, 320)])
def test_row_bands_and_column_segments(rows, columns):
    whole = pack_weight(mixed_weight())
    rows, columns = cover_rows(whole.layout, *rows), cover_columns(whole.layout, *columns)
    assert same(cut_weight(whole, rows, columns), whole, rows, columns)


@pytest.mark.parametrize(
    ("size", "wanted", "cover"),
    [
        (320, (64, 128), (64, 128)),  # one group over all columns: its scale serves each part
        (160, (0, 128), (0, 128)),  # ends within the first group, which begins at 0
        (160, (64, 192), (0, 320)),  # would leave the second group beginning at 160, no multiple of 64
        (160, (128, 192), (0, 320)),
        (64, (70, 100), (64, 128)),
        (128 // 4, (65, 130), (64, 192)),
    ],
)
def test_groups_that_are_cut(size, wanted, cover):
    whole = pack_weight(random_weight(64, 320, 4, size))
    assert cover_columns(whole.layout, *wanted) == cover
    assert same(cut_weight(whole, None, cover), whole, (0, 64), cover)


def test_parts_of_all_ranks_make_the_whole():
    whole = pack_weight(random_weight(64, 512, 3, 256, "float"))
    parts = [dequantize(cut_weight(whole, None, (k, k + 128))) for k in range(0, 512, 128)]
    assert torch.equal(torch.cat(parts, 1), dequantize(whole))


def test_permuted_columns_stay_together():
    whole = pack_weight(random_weight(130, 128, 4, 32, permuted=True))
    assert cover_columns(whole.layout, 0, 64) == (0, 128)
    assert same(cut_weight(whole, (64, 130)), whole, (64, 130), (0, 128))
    with pytest.raises(FormatError, match="columns 0..64 cannot be cut out"):
        cut_weight(whole, None, (0, 64))


def test_ranges_that_cannot_be():
    whole = pack_weight(random_weight(130, 128, 4, 32))
    for rows in ((0, 63), (1, 64)):
        with pytest.raises(FormatError, match="no whole supertiles"):
            cut_weight(whole, rows)
    for rows in ((0, 131), (64, 64)):
        with pytest.raises(FormatError, match="are not in 0..130"):
            cut_weight(whole, rows)


def test_stacked_weights_are_one():
    weights = [
        pack_weight(random_weight(n, 128, bits, 32, zero)) for n, bits, zero in ((70, 3, "int"), (64, 8, "none"))
    ]
    stacked = stack_weights(weights)
    assert len(stacked.layout.segments) == 2
    assert torch.equal(dequantize(stacked), torch.cat([dequantize(weight) for weight in weights]))
    assert stack_weights(weights[:1]) is weights[0]


def test_what_cannot_be_stacked():
    first = pack_weight(random_weight(64, 128, 4, 32, "int"))
    for other, reason in (
        (random_weight(64, 128, 4, 32, "float"), "zeros of uint8 and of float16"),
        (random_weight(64, 128, 4, 32, scale_dtype="float32"), "float16 scales"),
        (random_weight(64, 64, 4, 32), "128 columns"),
        (random_weight(64, 128, 4, 32, permuted=True), "one has permuted columns"),
    ):
        packed = pack_weight(other)
        assert reason in why_not_stacked(first, packed)
        with pytest.raises(FormatError, match="cannot be one"):
            stack_weights([first, packed])
    a, b = (pack_weight(random_weight(64, 128, 4, 32, permuted=True, seed=seed)) for seed in (1, 2))
    assert why_not_stacked(a, b) == "their columns are permuted differently"
