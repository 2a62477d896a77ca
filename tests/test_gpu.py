"""What needs a CUDA device. Without CUDA kernels: packed weights travel, and refusals are in words."""

import pytest
import torch
from cases import mixed_weight, random_weight, support_matrix
from models import tiny_model

import mpq_kernels as mpq
from mpq_kernels import packing, reference
from mpq_kernels.backends import BACKENDS
from mpq_kernels.weights import QuantizedBlock, QuantizedWeight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_packed_tensors_come_back_as_they_went():
    packed = packing.pack(mixed_weight(permuted=True))
    back = packed.to("cuda").to("cpu")
    for name, tensor in packed.tensors().items():
        assert torch.equal(back.tensors()[name], tensor), name


def test_unpacking_on_the_device_gives_the_same_codes():
    packed = packing.pack(mixed_weight(permuted=True))
    for (_, _, a), (_, _, b) in zip(
        packing.unpack(packed).blocks, packing.unpack(packed.to("cuda")).blocks, strict=True
    ):
        assert torch.equal(a.codes, b.codes.cpu()) and torch.equal(a.scales, b.scales.cpu())
    assert torch.equal(reference.dequantize(packed), reference.dequantize(packed.to("cuda")).cpu())


@pytest.mark.parametrize(("bits", "zero", "scale_dtype"), support_matrix())
def test_packing_on_the_device_gives_the_same_words(bits, zero, scale_dtype):
    weight = random_weight(100, 96, bits, 32, zero, scale_dtype)
    block = weight.blocks[0][2]
    moved = QuantizedBlock(
        bits, block.codes.cuda(), block.scales.cuda(), None if block.zeros is None else block.zeros.cuda()
    )
    on_device = packing.pack(QuantizedWeight.uniform(moved), "torch")
    assert torch.equal(on_device.qweight.cpu(), packing.pack(weight).qweight)


def test_a_layer_without_a_backend_refuses_before_it_moves():
    layer = mpq.MixedLinear.from_packed(packing.pack(mixed_weight()))
    if "cuda" in BACKENDS:
        pytest.skip("this build has a CUDA backend")
    with pytest.raises(mpq.UnsupportedError, match="no backend for packed weights on cuda"):
        layer.cuda()
    assert layer.qweight.device.type == "cpu" and layer(torch.zeros(1, 320)).shape == (1, 200)


def test_the_reference_backend_generates_what_the_cpu_generates(tmp_path):
    tiny_model("llama", tmp_path / "m", sizes={"intermediate_size": 128})
    plan = mpq.Plan.uniform(tmp_path / "m", bits=4, group_size=32)
    mpq.pack(tmp_path / "m", tmp_path / "out", plan, quantizer="rtn")
    model = mpq.load(tmp_path / "out", device="cuda", backend="reference")
    ids = torch.arange(3, 20)[None]
    logits = model(ids.cuda()).logits.cpu()
    expected = mpq.load(tmp_path / "out")(ids).logits
    assert (logits - expected).norm() <= 1e-3 * expected.norm()  # fp32 in another order, or TF32 where torch allows it
