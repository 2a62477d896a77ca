"""The oracle against sums written out by hand."""

import itertools

import pytest
import torch

from mpq_kernels.format import reference
from mpq_kernels.format.weights import QuantizedBlock, QuantizedWeight
from mpq_kernels.format.words import pack_weight
from tests.made.weights import BITS, ZEROS, mixed_weight, random_perm, random_weight


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero", ZEROS)
def test_dequantize_element_by_element(bits, zero):
    weight = random_weight(5, 12, bits, 4, zero, "float32", permuted=True, seed=bits)
    block, perm = weight.blocks[0][2], weight.perm
    actual = reference.dequantize(weight, torch.float64)
    for n, k in itertools.product(range(5), range(12)):
        middle = (2**bits - 1) / 2 if zero == "half" or bits == 1 else 2 ** (bits - 1)
        z = middle if block.zeros is None else float(block.zeros[n, k // 4])
        code, scale = int(block.codes[n, k]), float(block.scales[n, k // 4])
        expected = code * scale + z if zero == "min" else (code - z) * scale
        assert actual[n, int(perm[k])].item() == expected


def test_one_bit_symmetric_is_plus_and_minus_half_a_scale():
    block = QuantizedBlock(1, torch.tensor([[0, 1]], dtype=torch.uint8), torch.tensor([[3.0]]))
    assert reference.dequantize(QuantizedWeight.uniform(block)).tolist() == [[-1.5, 1.5]]


def test_minima_are_added_as_the_second_rounding():
    """As GGUF's own code does for Q4_1 and Q4_K: d * q + m in fp32. A group of one value has the scale 0."""
    scale, minimum = float.fromhex("0x1.217022p-4"), float.fromhex("-0x1.758092p-1")
    codes = torch.tensor([[13, 0, 15, 7]], dtype=torch.uint8)
    block = QuantizedBlock(4, codes, torch.tensor([[scale, 0.0]]), torch.tensor([[minimum, -3.0]]), "min")
    dense = reference.dequantize(QuantizedWeight.uniform(block))
    # One rounding of 13 * scale + minimum would end in 694.
    assert dense.tolist() == [[float.fromhex("0x1.835698p-3"), minimum, -3.0, -3.0]]


def test_packed_and_quantized_agree():
    weight = mixed_weight(permuted=True)
    assert torch.equal(reference.dequantize(pack_weight(weight)), reference.dequantize(weight))


def test_no_negative_zero():
    block = QuantizedBlock(2, torch.full((1, 4), 2, dtype=torch.uint8), torch.tensor([[-1.0]]))
    dense = reference.dequantize(QuantizedWeight.uniform(block))
    assert not torch.signbit(dense).any()


def test_linear_undoes_the_permutation():
    weight = random_weight(3, 8, 4, 8, scale_dtype="float32", permuted=True)
    block, x = weight.blocks[0][2], torch.randn(2, 8, dtype=torch.float64)
    straight = reference.dequantize(QuantizedWeight.uniform(block), torch.float64)
    perm = random_perm(8).long()
    expected = x[:, perm] @ straight.T
    torch.testing.assert_close(reference.linear(x, weight), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_bound_holds_for_torch_and_catches_a_wrong_code(dtype):
    weight = random_weight(64, 256, 4, 64, scale_dtype="float32", permuted=True)
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, bound = reference.linear(x, weight), reference.error_bound(x, weight)
    y = (x.float() @ reference.dequantize(weight).T).to(dtype)
    assert ((y.double() - expected).abs() <= bound).all()
    block = weight.blocks[0][2]
    codes = block.codes.clone()
    codes[5, 17] ^= 8
    wrong = QuantizedWeight.uniform(QuantizedBlock(4, codes, block.scales, block.zeros), weight.perm)
    y = (x.float() @ reference.dequantize(wrong).T).to(dtype)
    assert ((y.double() - expected).abs() > bound).any()
