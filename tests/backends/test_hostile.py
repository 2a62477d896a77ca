"""Calls of the operators with numbers and tensors that are not what they seem: each is an error."""

import pytest
import torch

import mpq_kernels.backends.ops  # noqa: F401  (registers the operators)
from mpq_kernels.format.words import pack_weight
from tests.made.weights import random_weight

WEIGHT = ("qweight", "scales", "zeros", "perm")


@pytest.fixture
def call():
    """The arguments of a right call of mpq::linear."""
    packed = pack_weight(random_weight(64, 64, 3, 32))
    args = {name: getattr(packed, name) for name in WEIGHT} | {"bias": None, "segments": packed.layout.segment_ints()}
    return args | {"x": torch.randn(2, 64), "out_features": 64, "in_features": 64}


BITS, GROUP, ZERO = 4, 5, 6  # places in the table


@pytest.mark.parametrize(("place", "words"), [(BITS, "is not 1..8"), (ZERO, "unknown kind of zeros")])
@pytest.mark.parametrize("more", [2**32, -(2**32), 2**40])
def test_numbers_beyond_32_bits_are_not_cut(call, place, words, more):
    torch.ops.mpq.linear(**call)
    call["segments"][place] += more
    with pytest.raises(RuntimeError, match=words):
        torch.ops.mpq.linear(**call)


@pytest.mark.parametrize("key", ["out_features", "in_features"])
@pytest.mark.parametrize("value", [0, -1, 2**31, 2**33, 2**62, -(2**63)])
def test_sizes_beyond_what_kernels_count(call, key, value):
    """With 2**33 rows and more the count of words would leave 63 bits, and could end at that of the tensor."""
    call[key] = value
    call["segments"][1 if key == "out_features" else 3] = value
    call["x"] = torch.randn(2, 64)
    with pytest.raises(RuntimeError, match=r"must be 1\.\.2147483647|its last dimension is 64"):
        torch.ops.mpq.linear(**call)


@pytest.mark.parametrize("name", ["x", "qweight", "scales", "zeros"])
@pytest.mark.parametrize("operator", ["linear", "linear_int8", "dequantize", "grouped_linear", "grouped_linear_int8"])
def test_tensors_without_values_give_none(call, operator, name):
    if operator == "dequantize":
        if name == "x":
            pytest.skip("takes none")
        del call["x"], call["bias"]
        call["dtype"] = torch.float32
    if operator.startswith("grouped"):
        call["offsets"] = torch.tensor([0, 2], dtype=torch.int32)
    getattr(torch.ops.mpq, operator)(**call)
    call[name] = call[name].to("meta")
    with pytest.raises(RuntimeError, match="on several devices: .*cpu.*meta"):
        getattr(torch.ops.mpq, operator)(**call)
    call = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in call.items()}
    assert getattr(torch.ops.mpq, operator)(**call).is_meta
