"""Choosing a backend: in order, once, with every reason in words. All agree with the reference."""

import pytest
import torch

from mpq_kernels import MixedLinear, UnsupportedError
from mpq_kernels.backends import BACKENDS, select
from mpq_kernels.format import reference
from mpq_kernels.format.words import pack_weight
from tests.made.backends import device_for
from tests.made.weights import mixed_weight, random_weight


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_agrees_with_the_reference(name):
    device, dtype = device_for(name), torch.float16  # which every backend takes
    for weight in (mixed_weight(permuted=True), random_weight(65, 172, 3, 43, "float")):
        packed = pack_weight(weight)
        bias = torch.randn(packed.layout.out_features)
        layer = MixedLinear.from_packed(packed.to(device), bias.to(device), backend=name)
        assert layer.backend == name
        assert torch.equal(layer.dequantize().cpu(), reference.dequantize(packed))
        x = torch.randn(9, packed.layout.in_features).to(dtype)
        expected, bound = reference.linear(x, packed, bias), reference.error_bound(x, packed, bias)
        assert ((layer(x.to(device)).cpu().double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_says_why_not(name):
    """Either it serves on one of its devices, or there is a reason in words; never both, never an exception."""
    backend, layout = BACKENDS[name], random_weight(4, 64, 4).layout
    assert backend.name == name and backend.summary
    for device in backend.devices or ("cpu", "cuda"):
        reason = backend.why_not(layout, device)
        assert reason is None or reason.strip()
        assert (reason is None) == (backend.why_unavailable() is None and backend.why_not_layout(layout) is None)
    if backend.devices:
        assert "not on abacus" in backend.why_not(layout, "abacus")
    if backend.linear_int8 is None:
        assert "int8" in backend.why_not(layout, (*backend.devices, "cpu")[0], "int8")


def test_the_cpu_is_first_on_the_cpu():
    assert select(random_weight(4, 64, 4).layout, "cpu").name == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so a backend serves it")
def test_a_refusal_lists_every_reason():
    layout = random_weight(4, 64, 4).layout
    with pytest.raises(UnsupportedError) as caught:
        select(layout, "cuda")
    text = str(caught.value)
    assert "no backend for packed weights on cuda" in text and all(f"{name}: " in text for name in BACKENDS)
    assert "cpu: runs on cpu, not on cuda" in text and "reference: only when asked for" in text
    assert select(layout, "cuda", "reference").name == "reference"
    with pytest.raises(UnsupportedError, match="there is no backend 'marlin'; there are " + ", ".join(BACKENDS)):
        select(layout, "cpu", "marlin")
    with pytest.raises(UnsupportedError, match="cpu: runs on cpu, not on cuda"):
        select(layout, "cuda", "cpu")
