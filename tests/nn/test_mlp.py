"""A gated MLP in one module: which modules are taken for one, and that it computes what they did."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from mpq_kernels.backends import BACKENDS
from mpq_kernels.nn import mlp as gated
from mpq_kernels.nn.linear import MixedLinear
from mpq_kernels.nn.mlp import GatedMLP, fuse_gates, gates_by_silu
from mpq_kernels.nn.replace import replace_linears
from mpq_kernels.plan.plan import Plan
from tests.backends.cuda import simulated

PLAN = Plan.from_dict({"version": 1, "default": {"bits": 4, "group_size": 64}})


def llama_mlp(act="silu"):
    config = LlamaConfig(hidden_size=128, intermediate_size=192, hidden_act=act, mlp_bias=True)
    return LlamaMLP(config)


class Model(nn.Module):
    """One MLP, with a place to stand in."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        """As its MLP."""
        return self.mlp(x)


class Swapped(LlamaMLP):
    """The gate on the other side."""

    def forward(self, x):
        """silu(up) * gate."""
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Clamped(LlamaMLP):
    """Something behind the product of the two."""

    def forward(self, x):
        """min(silu(gate) * up, 1)."""
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(max=1.0))


class Noisy(LlamaMLP):
    """Another computation while it trains."""

    def forward(self, x):
        """Dropout in front."""
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


class WithNorm(LlamaMLP):
    """A norm beside the projections."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.LayerNorm(config.intermediate_size)


@pytest.fixture
def calls(monkeypatch):
    """The CPU backend with the CUDA library's product of silu(gate) * up, in the simulator; the calls of it."""
    seen = []

    def product(*args):
        seen.append(args[0].shape)
        return simulated.operators().silu_mul_linear(*args)

    monkeypatch.setitem(BACKENDS, "cpu", dataclasses.replace(BACKENDS["cpu"], silu_mul_linear=product))
    return seen


@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
def test_only_silu_is_a_gate_of_the_kernel(act):
    assert gates_by_silu(llama_mlp(act)) == (act == "silu")


@pytest.mark.parametrize("kind", [Swapped, Clamped, Noisy, WithNorm])
def test_what_computes_something_else_is_left(kind):
    config = LlamaConfig(hidden_size=128, intermediate_size=192)
    assert not gates_by_silu(kind(config)) and gates_by_silu(LlamaMLP(config))


def test_modules_without_the_three_projections_are_left():
    assert not gates_by_silu(nn.Sequential(nn.Linear(4, 4))) and not gates_by_silu(nn.Linear(4, 4))


def test_nothing_is_replaced_where_no_backend_takes_the_gate():
    model = Model(llama_mlp())
    replace_linears(model, PLAN, quantizer="rtn")
    if all(b.silu_mul_linear is None or b.why_unavailable() for b in BACKENDS.values()):
        assert type(model.mlp) is LlamaMLP and fuse_gates(model) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_the_gate_is_part_of_the_product_for_few_tokens(calls, dtype, tokens):
    plain = Model(llama_mlp().to(dtype))
    with torch.no_grad():
        plain.mlp.down_proj.bias.normal_()
    model = copy.deepcopy(plain)
    replace_linears(model, PLAN, quantizer="rtn")
    assert type(model.mlp) is GatedMLP and type(model.mlp.down_proj) is MixedLinear
    assert set(model.state_dict()) >= {f"mlp.{name}_proj.qweight" for name in ("gate", "up", "down")}
    assert model.mlp.hidden_size == 128, "attributes of the module that was replaced can still be read"
    x = torch.randn(1, tokens, 128, dtype=dtype)
    with torch.no_grad():
        y, down = model(x), model.mlp.down_proj
        hidden = nn.functional.silu(model.mlp.gate_proj(x)) * model.mlp.up_proj(x)
        apart = down(hidden)
    assert len(calls) == (tokens <= gated.MOST_TOKENS) and y.dtype == dtype
    # silu, from an exp that may differ in its last bit, and its product are rounded to dtype on both sides, y once
    magnitude = hidden.abs().float() @ down.dequantize().abs().T + down.bias.abs().float()
    assert ((y - apart).abs() <= 3 * torch.finfo(dtype).eps * magnitude).all()


def test_gradients_and_other_dtypes_go_the_usual_way(calls):
    model = Model(llama_mlp())
    replace_linears(model, PLAN, quantizer="rtn")
    reference = llama_mlp()
    for name in ("gate_proj", "up_proj", "down_proj"):
        reference.register_module(name, getattr(model.mlp, name))
    x = torch.randn(2, 3, 128, requires_grad=True)
    wanted = reference(x)
    assert torch.equal(model(x), wanted)
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    (right,) = torch.autograd.grad(wanted.sum(), x)
    assert torch.equal(grad, right)
    half = x.detach().half()
    gate = model.mlp.gate_proj(half).requires_grad_()
    model.mlp.down_proj(model.mlp.up_proj(half), gate).sum().backward()
    assert gate.grad.abs().sum() > 0 and not calls


def test_int8_activations_go_the_usual_way(calls):
    model = Model(llama_mlp().half())
    replace_linears(model, PLAN, quantizer="rtn", activations="int8")
    with torch.no_grad():
        model(torch.randn(2, 128).half())
    assert not calls


def test_copies_and_pickles(calls):
    model = Model(llama_mlp().half())
    replace_linears(model, PLAN, quantizer="rtn")
    x = torch.randn(2, 128).half()
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), model(x)) and other.mlp.act_fn is not model.mlp.act_fn
