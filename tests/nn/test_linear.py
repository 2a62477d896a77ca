"""MixedLinear: a drop-in for nn.Linear in every way that other code touches one."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from mpq_kernels import FormatError, MixedLinear, QuantizeError, UnsupportedError
from mpq_kernels.backends import BACKENDS
from mpq_kernels.format import reference
from mpq_kernels.format.words import pack_weight
from tests.made.weights import X_DTYPES, mixed_weight, random_weight


def dense_of(layer: MixedLinear) -> nn.Linear:
    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    dense.weight.data = layer.dequantize()
    if layer.bias is not None:
        dense.bias.data = layer.bias.detach().float()
    return dense


def mixed_layer(bias=True, dtype=torch.float32) -> MixedLinear:
    packed = pack_weight(mixed_weight(permuted=True))
    return MixedLinear.from_packed(packed, torch.randn(200, dtype=dtype) if bias else None, dtype=dtype)


@pytest.mark.parametrize("dtype", X_DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_from_linear_is_close_to_the_linear_it_replaces(dtype, bias):
    linear = nn.Linear(128, 96, bias=bias).to(dtype)
    x = torch.randn(2, 5, 128, dtype=dtype)
    for bits, allowed in ((8, 0.01), (4, 0.15)):
        layer = MixedLinear.from_linear(linear, bits=bits, group_size=64, symmetric=False)
        y, wanted = layer(x), linear(x)
        assert y.dtype == dtype and y.shape == wanted.shape
        assert (y - wanted).float().norm() <= allowed * wanted.float().norm()
        assert layer.weight.dtype == dtype


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("quantizer", ["rtn", "hqq"])
def test_from_linear_dequantizes_to_what_it_computes(symmetric, quantizer):
    layer = MixedLinear.from_linear(nn.Linear(192, 70), 3, 64, symmetric, quantizer=quantizer)
    x = torch.eye(192)
    assert torch.equal(layer(x) - layer.bias, (layer.dequantize().T + layer.bias) - layer.bias)
    assert torch.equal(layer.dequantize(), reference.dequantize(layer.packed))


def test_from_linear_refuses_bad_input():
    with pytest.raises(FormatError, match="100 columns are not a multiple of group_size=64"):
        MixedLinear.from_linear(nn.Linear(100, 8), 4, 64)
    broken = nn.Linear(64, 8)
    broken.weight.data[3, 5] = float("nan")
    with pytest.raises(QuantizeError, match="NaN"):
        MixedLinear.from_linear(broken, 4, 64)
    with pytest.raises(QuantizeError, match="rtm"):
        MixedLinear.from_linear(nn.Linear(64, 8), 4, 64, quantizer="rtm")


def test_any_leading_shape_and_no_tokens():
    layer, x = mixed_layer(), torch.randn(2, 3, 4, 320)
    flat = layer(x.view(24, 320))
    assert torch.equal(layer(x), flat.view(2, 3, 4, 200))
    assert torch.equal(layer(x[0, 0, 0]), layer(x[0, 0, :1])[0])
    assert layer(x[:0]).shape == (0, 3, 4, 200)


def test_weight_can_be_inspected_but_not_mistaken_for_values():
    layer = mixed_layer(dtype=torch.bfloat16)
    weight = layer.weight
    assert weight.shape == (200, 320) and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    assert weight.untyped_storage().nbytes() == 2
    assert nn.functional.linear(torch.ones(1, 320, dtype=torch.bfloat16), weight).isnan().all()
    assert "weight" not in layer.state_dict()


def test_state_dict_is_strict():
    layer = mixed_layer()
    assert list(layer.state_dict()) == ["bias", "qweight", "scales", "zeros", "perm"]
    other = MixedLinear(layer.layout, bias=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 320)
    assert torch.equal(other(x), layer(x))
    state = layer.state_dict()
    for name, broken in (
        ("qweight", state["qweight"][1:]),
        ("scales", state["scales"].float()),
        ("zeros", state["zeros"].to(torch.int32)),
    ):
        with pytest.raises(RuntimeError, match=name):
            other.load_state_dict({**state, name: broken})
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({k: v for k, v in state.items() if k != "perm"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "weight": torch.zeros(1)})


def test_deepcopy_pickle_and_torch_save():
    layer, x = mixed_layer(), torch.randn(3, 320)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(twin(x), layer(x)) and twin.backend == layer.backend
        assert twin.qweight.data_ptr() != layer.qweight.data_ptr()


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float])
def test_casts_leave_packed_tensors_alone(cast):
    layer = mixed_layer()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    cast(layer)
    for name, tensor in layer.state_dict().items():
        if name != "bias":
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert layer.weight.dtype == layer.bias.dtype


def test_meta_device_and_back():
    layer = mixed_layer()
    meta = MixedLinear(layer.layout, bias=True, device="meta")
    assert meta.backend == "none" and meta.weight.is_meta
    assert meta(torch.randn(5, 320, device="meta")).shape == (5, 200)
    empty = meta.to_empty(device="cpu")
    assert empty.backend == "cpu"
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(2, 320)
    assert torch.equal(empty(x), layer(x))


def test_a_weight_without_values_never_multiplies_an_x_with_values():
    meta = MixedLinear(mixed_layer().layout, bias=True, device="meta")
    with pytest.raises(UnsupportedError, match="the packed weight on the meta device"):
        meta(torch.randn(2, 320))
    taken_away = mixed_layer()
    for name, tensor in taken_away.packed.tensors().items():  # as offloading does, past the layer
        taken_away._buffers[name] = tensor.to("meta")
    for x in (torch.randn(2, 320), torch.randn(2, 320, requires_grad=True)):
        with pytest.raises(UnsupportedError, match="the packed weight on the meta device"):
            taken_away(x)


def test_tensors_that_arrive_past_the_layer_are_used():
    layer, x = mixed_layer(), torch.randn(2, 320)
    meta = MixedLinear(layer.layout, bias=True, device="meta")
    meta._buffers.update(layer._buffers)
    meta.bias = layer.bias
    assert torch.equal(meta.dequantize(), layer.dequantize())
    assert torch.equal(meta(x), layer(x)) and meta.backend == layer.backend


def test_the_backward_pass_uses_the_tensors_of_the_forward_pass():
    layer, x = mixed_layer(), torch.randn(2, 320, requires_grad=True)
    wanted = layer.dequantize().sum(0).expand(2, -1)
    y = layer(x)
    for name, tensor in layer.packed.tensors().items():
        layer._buffers[name] = tensor.to("meta")
    y.sum().backward()
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-3)


def test_representation_says_widths_and_backend():
    text = repr(mixed_layer())
    for part in ("in_features=320", "bits=3|8|2|5|1|6|7", "bias=True", "backend=cpu", "bpw="):
        assert part in text


def test_gradients_reach_x_and_bias():
    layer = mixed_layer()
    layer.bias.requires_grad_(True)
    dense = dense_of(layer)
    x = torch.randn(2, 7, 320, requires_grad=True)
    z = x.detach().clone().requires_grad_(True)
    cotangent = torch.randn(2, 7, 200)
    layer(x).backward(cotangent)
    dense(z).backward(cotangent)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_assign_refuses_another_layout_or_bias():
    layer, other = mixed_layer(), pack_weight(random_weight(200, 320, 4, 64))
    with pytest.raises(FormatError, match="layout"):
        layer.assign(other, torch.zeros(200))
    with pytest.raises(FormatError, match="bias must be"):
        layer.assign(layer.packed, torch.zeros(3))
    with pytest.raises(FormatError, match="bias must be"):
        MixedLinear.from_packed(other, torch.zeros(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_whole_graph_with_any_number_of_tokens(backend):
    if backend == "reference":
        pytest.skip("the reference is not meant to be traced")
    layer = mixed_layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (2, 3, 9):
            x = torch.randn(tokens, 320)
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.slow
def test_compile_with_inductor():
    model = nn.Sequential(mixed_layer(), nn.SiLU(), MixedLinear.from_linear(nn.Linear(200, 64), 4, 40))
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        x = torch.randn(3, 320)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_export_with_dynamic_batch():
    layer = mixed_layer()
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(layer, (torch.randn(4, 320),), dynamic_shapes=({0: batch},))
    calls = [node for node in program.graph.nodes if node.target is torch.ops.mpq.linear.default]
    assert len(calls) == 1
    for tokens in (1, 4, 33):
        x = torch.randn(tokens, 320)
        assert torch.equal(program.module()(x), layer(x))
