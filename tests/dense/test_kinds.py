"""The classes that are taken for linears compute x @ W.T + b; others are none, and are listed as what they are."""

import importlib

import pytest
import torch
from torch import nn

from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.dense.kinds import STORES_TRANSPOSED, is_linear, is_transposed, linear_shape
from mpq_kernels.dense.names import list_linears
from tests.made.checkpoints import tiny_model
from tests.made.other_linears import OTHER_LINEARS, tiny_other

N, K = 12, 20


def made(name):
    module, _, cls = name.rpartition(".")
    out_first = getattr(importlib.import_module(module), cls)
    linear = out_first(N, K) if cls == "Conv1D" else out_first(K, N)
    nn.init.normal_(linear.bias)
    return linear


@pytest.mark.parametrize("name", STORES_TRANSPOSED)
def test_a_class_of_the_table_is_a_linear(name):
    """Computed here in fp64 from what is stored; checked again with every version of torch and transformers."""
    linear = made(name).double()
    assert is_linear(linear) and linear_shape(linear) == (N, K)
    weight = linear.weight.T if is_transposed(linear) else linear.weight
    x = torch.randn(3, 5, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = (x[..., None, :] * weight).sum(-1) + linear.bias
    assert weight.shape == (N, K) and torch.allclose(linear(x), wanted, rtol=0, atol=1e-12)  # K roundings of 2**-53


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Same(nn.Linear):
    pass


def test_other_classes_are_not():
    held = nn.MultiheadAttention(8, 2)
    with_scale = nn.Linear(4, 4)
    with_scale.register_parameter("scale", nn.Parameter(torch.ones(1)))
    for module in (Scaled(4, 4), Same(4, 4), held.out_proj, with_scale, nn.Conv1d(4, 4, 1), nn.Bilinear(4, 4, 4)):
        assert not is_linear(module), type(module).__name__


@pytest.mark.parametrize("family", OTHER_LINEARS)
def test_they_are_listed_with_their_tensors(family, tmp_path):
    model = tiny_other(family, tmp_path)
    source = DenseCheckpoint.open(tmp_path)
    specs = source.linears()
    assert [spec.name for spec in specs] == [spec.name for spec in list_linears(model)]
    assert len(specs) == 1 + 2 * 4  # the head, and four in each of two blocks
    for spec in specs:
        module = model.get_submodule(spec.name)
        weight = module.weight.T if "Conv1D" in type(module).__name__ else module.weight
        assert torch.equal(source.weight(spec), weight) and source.weight(spec).is_contiguous()
        assert (spec.out_features, spec.in_features) == weight.shape
    assert source.model_map.others == ()


def test_what_is_none_is_told(tmp_path, monkeypatch):
    tiny_model("llama", tmp_path)
    kept = {name: stored for name, stored in STORES_TRANSPOSED.items() if "Linear" not in name}
    monkeypatch.setattr("mpq_kernels.dense.kinds.STORES_TRANSPOSED", kept)
    others = DenseCheckpoint.open(tmp_path).model_map.others
    assert {other.kind for other in others} == {"Linear"} and len(others) == 14
    assert sum(other.elements for other in others) == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 172)
    assert others[0].owner == "model.layers.0.self_attn.q_proj"
