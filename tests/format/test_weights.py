"""The two values of the waist refuse what they do not mean, and slice without copying."""

import pytest
import torch

from mpq_kernels.errors import FormatError
from mpq_kernels.format import reference
from mpq_kernels.format.weights import PackedWeight, QuantizedBlock, QuantizedWeight
from mpq_kernels.format.words import pack_weight
from tests.made.weights import mixed_weight, random_block, random_perm, random_weight

CODES = torch.zeros(4, 8, dtype=torch.uint8)
SCALES = torch.ones(4, 2, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((9, CODES, SCALES), "bits=9"),
        ((4, CODES.int(), SCALES), "codes must be a non-empty uint8"),
        ((4, CODES[:0], SCALES[:0]), "codes must be a non-empty uint8"),
        ((2, CODES + 4, SCALES), "code 4 does not fit 2 bits"),
        ((4, CODES, SCALES.double()), "scales must be one of"),
        ((4, CODES, SCALES[:3]), "scales must be [4, groups]"),
        ((4, CODES, torch.ones(4, 3)), "groups dividing 8"),
        ((4, CODES, SCALES * float("inf")), "NaN or Inf"),
        ((4, CODES, SCALES, SCALES.float()), "zeros must be uint8 or torch.float16"),
        ((4, CODES, SCALES, torch.zeros(4, 1, dtype=torch.uint8)), "of shape (4, 2)"),
        ((4, CODES, SCALES, SCALES * float("nan")), "float zeros hold NaN or Inf"),
        ((4, CODES, SCALES, SCALES * float("inf"), "min"), "float zeros hold NaN or Inf"),
        ((4, CODES, SCALES, SCALES, "half"), "zero='half': zeros are given"),
        ((4, CODES, SCALES, None, "min"), "zero='min': zeros are missing"),
        ((4, CODES, SCALES, SCALES, "int"), "zero='int': zeros are float16"),
        ((4, CODES, SCALES, CODES[:, :2], "min"), "zero='min': zeros are uint8"),
        ((4, CODES, SCALES, None, "table"), "zero='table' is reserved"),
    ],
)
def test_bad_blocks_are_refused(arguments, words):
    with pytest.raises(FormatError) as caught:
        QuantizedBlock(*arguments)
    assert words in str(caught.value)


def test_packed_tensors_must_match_the_layout():
    packed = pack_weight(random_weight(70, 64, 4, 32, permuted=True))
    good = packed.tensors()
    for change, words in (
        ({"qweight": good["qweight"][1:]}, "qweight must be int32"),
        ({"scales": good["scales"].float()}, "scales must be float16"),
        ({"zeros": None}, "zeros is missing"),
        ({"perm": None}, "perm is missing"),
    ):
        with pytest.raises(FormatError, match=words):
            PackedWeight(packed.layout, **{**good, **change})
    plain = pack_weight(random_weight(70, 64, 4, 32, zero="none"))
    with pytest.raises(FormatError, match="zeros is not expected"):
        PackedWeight(plain.layout, plain.qweight, plain.scales, plain.scales)


def test_values_no_packer_writes_are_found():
    packed = pack_weight(random_weight(70, 64, 4, 32, zero="float", permuted=True))
    packed.check_values()
    packed.zeros[3] = float("nan")
    with pytest.raises(FormatError, match="zeros hold NaN or Inf"):
        packed.check_values()
    packed.zeros[3] = 0
    packed.perm[0] = packed.perm[1]
    with pytest.raises(FormatError, match="perm is not a permutation"):
        packed.check_values()


def test_rows_are_views_with_the_same_meaning():
    packed = pack_weight(mixed_weight())
    whole = reference.dequantize(packed)
    for n0, n1 in ((0, 70), (70, 134), (70, 199), (199, 200), (0, 200)):
        part = packed.rows(n0, n1)
        assert torch.equal(reference.dequantize(part), whole[n0:n1])
        assert part.qweight.untyped_storage().data_ptr() == packed.qweight.untyped_storage().data_ptr()
    with pytest.raises(FormatError):
        packed.rows(0, 71)


def test_stack_is_one_weight_of_several_widths():
    members = [random_weight(96, 128, bits, 64, seed=bits) for bits in (4, 3, 8)]
    fused = QuantizedWeight.stack(members)
    assert [s.bits for s in fused.layout.segments] == [4, 3, 8]
    expected = torch.cat([reference.dequantize(m) for m in members])
    assert torch.equal(reference.dequantize(pack_weight(fused)), expected)


def test_stack_needs_one_permutation():
    perm = random_perm(128)
    block = random_block(8, 128, 4, 64)
    QuantizedWeight.stack([QuantizedWeight.uniform(block, perm), QuantizedWeight.uniform(block, perm.clone())])
    with pytest.raises(FormatError, match="permutations of K must be equal"):
        QuantizedWeight.stack([QuantizedWeight.uniform(block, perm), QuantizedWeight.uniform(block)])


def test_one_scale_dtype_a_weight():
    blocks = ((0, 0, random_block(8, 64, 4, 64)), (8, 0, random_block(8, 64, 4, 64, scale_dtype="float32")))
    with pytest.raises(FormatError, match="the scales of one weight have one dtype"):
        _ = QuantizedWeight(blocks).layout
