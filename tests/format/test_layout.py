"""Segments and sizes: what is accepted, what is refused and in which words, and that every byte is accounted for."""

import dataclasses

import pytest

from mpq_kernels.errors import FormatError
from mpq_kernels.format.codes import SEGMENT_INTS
from mpq_kernels.format.kinds import KINDS, ZERO_KINDS
from mpq_kernels.format.layout import Segment, SizeBreakdown, WeightLayout, segments_from_ints

FUSED = (
    Segment(0, 100, 0, 128, 3, 64, "int"),
    Segment(0, 100, 128, 200, 8, 72, "int"),
    Segment(100, 132, 0, 200, 2, 40, "none"),
)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 64, 0, 100, 4, 64, "int"), "100 columns are not a multiple of group_size=64 (remainder 36)"),
        ((0, 64, 0, 64, 9, 64, "int"), "bits=9 is not one of"),
        ((0, 64, 32, 96, 4, 64, "int"), "column cuts must be multiples of 64"),
        ((64, 64, 0, 64, 4, 64, "int"), "empty or negative"),
        ((-1, 64, 0, 64, 4, 64, "int"), "empty or negative"),
        ((0, 64, 0, 64, 4, 0, "int"), "group_size=0"),
        ((0, 64, 0, 64, 4, 64, "nearly"), "zero='nearly' is not one of ('none', 'half', 'int', 'float', 'min')"),
        ((0, 64, 0, 64, 4, 64, "table"), "zero='table' is reserved for codes that name one of up to 16 values"),
        ((0, 64.0, 0, 64, 4, 64, "int"), "n1=64.0 is not an integer"),
        ((0, True, 0, 64, 4, 64, "int"), "n1=True is not an integer"),
    ],
)
def test_bad_segments_are_refused(arguments, words):
    with pytest.raises(FormatError, match=".*") as caught:
        Segment(*arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ((), "at least one segment"),
        (FUSED[:2], "cover 100 of 132 rows"),
        (FUSED[1:], "columns 0..128 are missing"),
        ((FUSED[0], FUSED[2]), "cover 128 of 200 columns"),
        ((FUSED[0], FUSED[0], FUSED[2]), "columns 0..128 are covered twice"),
        ((*FUSED, FUSED[2]), "are covered twice"),
        ((*FUSED[:2], Segment(110, 132, 0, 200, 2, 40, "none")), "rows 100..110 are missing"),
        ((FUSED[2], *FUSED[:2]), "rows 0..100 are missing"),
        ((*FUSED[:2], Segment(100, 132, 0, 200, 2, 40, "float")), "cannot mix integer and float zeros"),
        ((*FUSED[:2], Segment(100, 132, 0, 200, 2, 40, "min")), "cannot mix integer and float zeros"),
    ],
)
def test_segments_that_do_not_tile_are_refused(segments, words):
    with pytest.raises(FormatError) as caught:
        WeightLayout(132, 200, segments)
    assert words in str(caught.value)


def test_the_table_of_operators_comes_back_as_the_segments():
    assert tuple(field.name for field in dataclasses.fields(Segment)) == SEGMENT_INTS
    for zero in ZERO_KINDS:
        segments = (
            (*FUSED[:2], Segment(100, 132, 0, 200, 2, 40, zero))
            if KINDS[zero].stored != "scales"
            else (Segment(0, 132, 0, 200, 5, 200, zero),)
        )
        ints = WeightLayout(132, 200, segments).segment_ints()
        assert len(ints) == len(SEGMENT_INTS) * len(segments) and segments_from_ints(ints) == segments
    with pytest.raises(FormatError, match="7 integers each, not 8 in all"):
        segments_from_ints([*range(8)])
    for zero in (-1, len(ZERO_KINDS)):
        with pytest.raises(FormatError, match=f"unknown kind of zeros, {zero}"):
            segments_from_ints([0, 132, 0, 200, 5, 200, zero])


def test_offsets_follow_the_segments_without_gaps():
    layout = WeightLayout(132, 200, FUSED)
    words = [2 * 2 * 384, 2 * 2 * 1024, 1 * 4 * 256]
    assert [s.words for s in FUSED] == words
    assert [o.planes[0] for o in layout.offsets] == [0, words[0], words[0] + words[1]]
    assert layout.offsets[0].planes == (0, 2 * 2 * 256)  # 3 bits: planes of 2 and 1
    assert layout.offsets[1].planes == (words[0], words[0] + 2 * 2 * 512)  # 8 bits: two planes of 4
    assert [o.scales for o in layout.offsets] == [0, 2 * 128, 2 * 128 + 128]
    assert layout.tensor_specs() == {
        "qweight": ("int32", (sum(words),)),
        "scales": ("float16", (2 * 128 + 128 + 5 * 64,)),
        "zeros": ("uint8", (2 * 128 + 128,)),
    }


def test_rows_are_contiguous_parts():
    layout = WeightLayout(132, 200, FUSED)
    member, parts = layout.rows(100, 132)
    assert member.segments == (Segment(0, 32, 0, 200, 2, 40, "none"),)
    assert parts == {"qweight": (5632, 1024), "scales": (384, 320), "zeros": (384, 0)}
    with pytest.raises(FormatError, match="rows 0..50 hold no whole row band"):
        layout.rows(0, 50)


def test_size_adds_up_by_hand():
    # 65 x 80, 3 bits, groups of 16, int zeros: 2 x 2 supertiles, 5 groups of 128 stored rows.
    size = WeightLayout.uniform(65, 80, 3, 16, "int", "bfloat16").size()
    stored = 4 * 512 * 3 * 8 + 5 * 128 * (16 + 8)
    used = 65 * 80 * 3 + 65 * 5 * (16 + 8)
    assert size == SizeBreakdown(65 * 80 * 3, 65 * 5 * 16, 65 * 5 * 8, 0, stored - used, 65 * 80)
    assert size.total_bits == stored and size.total_bytes == stored // 8
    assert size.bits_per_weight == stored / (65 * 80)


@pytest.mark.parametrize("zero", ZERO_KINDS)
def test_zeros_are_counted_where_they_are_stored(zero):
    bits = {"none": 0, "half": 0, "int": 8, "float": 32, "min": 32}[zero]
    layout = WeightLayout.uniform(64, 128, 4, 64, zero, "float32")
    assert layout.size() == SizeBreakdown(64 * 128 * 4, 128 * 32, 128 * bits, 0, 0, 64 * 128)
    assert ("zeros" in layout.tensor_specs()) == (bits > 0)


def test_float_zeros_and_minima_share_a_tensor():
    segments = (Segment(0, 64, 0, 64, 4, 64, "float"), Segment(0, 64, 64, 128, 2, 64, "min"))
    layout = WeightLayout(64, 128, segments, "bfloat16")
    assert layout.tensor_specs()["zeros"] == ("bfloat16", (128,)) and layout.offsets[1].zeros == 64


def test_whole_tiles_have_no_padding():
    size = WeightLayout.uniform(4096, 4096, 3, 64, "int").size()
    assert size.padding == 0 and size.bits_per_weight == 3 + 24 / 64


def test_dict_round_trip_and_refusals():
    layout = WeightLayout(132, 200, FUSED, "float32", True)
    data = layout.to_dict()
    assert WeightLayout.from_dict(data) == layout
    for change, words in (
        ({"extra": 1}, "a layout has the keys"),
        ({"out_features": -1}, "out_features=-1 is not a positive integer"),
        ({"permuted": 1}, "permuted=1"),
        ({"segments": [[0, 1]]}, "segments must be a list"),
        ({"scale_dtype": "float64"}, "scale_dtype='float64'"),
        ({"scale_dtype": ["float16"]}, "scale_dtype=['float16']"),
        ({"segments": [[0, 132, 0, 200, 4, "64", "int"]]}, "group_size='64' is not an integer"),
        ({"segments": [[0, 132, 0, 200, 4, 200, ["int"]]]}, "zero=['int']"),
    ):
        with pytest.raises(FormatError) as caught:
            WeightLayout.from_dict({**data, **change})
        assert words in str(caught.value)
    with pytest.raises(FormatError, match="must be an object"):
        WeightLayout.from_dict([data])


def test_uniform_group_minus_one_is_all_columns():
    assert WeightLayout.uniform(8, 172, 4, -1).segments[0].group_size == 172
    with pytest.raises(FormatError, match="at least one row and one column"):
        WeightLayout.uniform(0, 172, 4)
