"""Choosing a backend: in order, once, with every reason in words. All agree with the reference."""

import pytest
import torch

from mpq_kernels import MixedLinear, UnsupportedError
from mpq_kernels.backends import BACKENDS, select
from mpq_kernels.format import reference
from mpq_kernels.format.words import pack_weight
from tests.made.weights import mixed_weight, random_weight


@pytest.mark.parametrize("name", [n for n, b in BACKENDS.items() if not b.devices or "cpu" in b.devices])
def test_every_backend_agrees_with_the_reference(name):
    for weight in (mixed_weight(permuted=True), random_weight(65, 172, 3, 43, "float")):
        packed = pack_weight(weight)
        layer = MixedLinear.from_packed(packed, torch.randn(packed.layout.out_features), backend=name)
        assert layer.backend == name
        assert torch.equal(layer.dequantize(), reference.dequantize(packed))
        x = torch.randn(9, packed.layout.in_features)
        expected = reference.linear(x, packed, layer.bias.detach())
        bound = reference.error_bound(x, packed, layer.bias.detach())
        assert ((layer(x).double() - expected).abs() <= bound).all()


def test_the_cpu_is_first_on_the_cpu():
    assert select(random_weight(4, 64, 4).layout, "cpu").name == "cpu"


def test_a_refusal_lists_every_reason():
    layout = random_weight(4, 64, 4).layout
    with pytest.raises(UnsupportedError) as caught:
        select(layout, "cuda")
    text = str(caught.value)
    assert (
        "no backend for packed weights on cuda" in text and "cuda: " in text and "cpu: runs on cpu, not on cuda" in text
    )
    assert "reference: only when asked for" in text
    assert select(layout, "cuda", "reference").name == "reference"
    with pytest.raises(UnsupportedError, match="there is no backend 'marlin'; there are cuda, triton, cpu, reference"):
        select(layout, "cpu", "marlin")
    with pytest.raises(UnsupportedError, match="cpu: runs on cpu, not on cuda"):
        select(layout, "cuda", "cpu")
