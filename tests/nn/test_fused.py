"""Fused projections of different widths: one call for all members, the same bits as each alone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from mpq_kernels import FormatError
from mpq_kernels.format.layout import Member
from mpq_kernels.format.weights import QuantizedWeight
from mpq_kernels.format.words import pack_weight
from mpq_kernels.nn.fused import FusedLinear, FusedMember
from mpq_kernels.nn.linear import MixedLinear
from tests.made.weights import random_weight

WIDTHS = {"q_proj": (4, 96, "int"), "k_proj": (3, 32, "none"), "v_proj": (8, 40, "int")}


class Attention(nn.Module):
    """What a model does with three projections of one input."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        weights = [random_weight(n, 128, bits, 64, zero, seed=bits) for bits, n, zero in WIDTHS.values()]
        members, row = [], 0
        for name, (_, n, _) in WIDTHS.items():
            members.append(Member(name, row, row + n))
            row += n
        self.qkv_proj = FusedLinear.from_members(
            pack_weight(QuantizedWeight.stack(weights)), members, torch.randn(168) if bias else None
        )
        for index, name in enumerate(WIDTHS):
            self.add_module(name, FusedMember(self.qkv_proj, index))
        self.alone = [
            MixedLinear.from_packed(pack_weight(w), None if not bias else self.qkv_proj.bias[m.n0 : m.n1].detach())
            for w, m in zip(weights, members, strict=True)
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Members above each other."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def expected(model: Attention, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([layer(x) for layer in model.alone], -1)


@pytest.fixture
def calls(monkeypatch):
    """Rows of every call of the operator."""
    rows = []

    def count(module):
        inner = module._linear

        def linear(x, *args):
            rows.append(args[-2])
            return inner(x, *args)

        monkeypatch.setattr(module, "_linear", linear)
        return rows

    return count


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_one_call_serves_all_members_with_the_same_bits(calls, bias, tokens):
    model, x = Attention(bias), torch.randn(tokens, 128)
    rows = calls(model.qkv_proj)
    with torch.no_grad():
        assert torch.equal(model(x), expected(model, x))
    assert rows == [168]
    assert model.qkv_proj._outputs is None, "outputs were kept after all members took theirs"


def test_a_changed_or_new_x_is_never_mistaken_for_the_old_one(calls):
    model = Attention()
    with torch.no_grad():
        x = torch.randn(2, 128)
        model.q_proj(x)
        x.mul_(2)
        assert torch.equal(model.k_proj(x), model.alone[1](x))
        model.q_proj(x)
        y = x.clone()
        assert torch.equal(model.v_proj(y), model.alone[2](y))
        for _ in range(20):  # a new tensor often gets the memory, and the id, of the one just freed
            z = torch.randn(2, 128)
            assert torch.equal(model.q_proj(z), model.alone[0](z))
            del z
        x = torch.randn(2, 128)
        assert torch.equal(model.q_proj(x), model.alone[0](x))
        assert torch.equal(model.q_proj(x), model.alone[0](x)), "the same member twice"


def test_members_alone_where_x_cannot_be_told_apart(calls):
    model = Attention()
    rows = calls(model.qkv_proj)
    with torch.inference_mode():
        x = torch.randn(2, 128)
        assert torch.equal(model(x), expected(model, x))
    x = torch.randn(2, 128, requires_grad=True)
    model(x).sum().backward()
    dense = torch.cat([layer.dequantize() for layer in model.alone])
    torch.testing.assert_close(x.grad, dense.sum(0).expand(2, -1), rtol=1e-4, atol=1e-3)
    assert rows == [96, 32, 40] * 2


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "gradients"])
def test_members_call_their_owner_as_a_module(how):
    model, calls = Attention(), []
    model.qkv_proj.register_forward_hook(lambda *_: calls.append(1))
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "gradients": torch.enable_grad}[how]():
        x = torch.randn(2, 128, requires_grad=how == "gradients")
        assert torch.equal(model(x), expected(model, x))
    assert len(calls) == (1 if how == "no_grad" else 3)


class Changed(nn.Module):
    """x is changed in place between its first two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As Attention's, with other inputs."""
        x = x * 2
        q = self.attention.q_proj(x)
        x.mul_(3)
        return torch.cat([q, self.attention.k_proj(x), self.attention.v_proj(x)], -1)


def operators(graph) -> list[str]:
    """Our operators in a graph, in order."""
    return [str(node.target) for node in graph.nodes if str(node.target).startswith("mpq")]


def compiled_with_graphs(model, **options):
    """(compiled model, the graphs that a compiler of torch.compile's got)."""
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return module

    return torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep), **options), graphs


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_product_in_a_compiled_graph(mode):
    torch._dynamo.reset()
    model, x = Attention(), torch.randn(3, 128)
    compiled, graphs = compiled_with_graphs(model, dynamic=True)
    with mode():
        for tokens in (x, torch.randn(2, 5, 128)):
            assert torch.equal(compiled(tokens), expected(model, tokens))
    assert [operators(graph) for graph in graphs] == [["mpq.linear.default"]] * 2


def test_one_product_of_rounded_activations_in_a_compiled_graph():
    torch._dynamo.reset()
    model, x = Attention(), torch.randn(3, 128)
    model.qkv_proj.set_activations("int8")
    compiled, graphs = compiled_with_graphs(model)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x)) and not torch.equal(model(x), expected(model, x))
    assert [operators(graph) for graph in graphs] == [["mpq.linear_int8.default"]]


def test_a_compiled_change_in_place_is_seen():
    torch._dynamo.reset()
    model, x = Changed(), torch.randn(3, 128)
    compiled, graphs = compiled_with_graphs(model)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    assert [operators(graph) for graph in graphs] == [["mpq.linear.default"] * 2]


def test_compiled_gradients_reach_x():
    torch._dynamo.reset()
    model, x = Attention(), torch.randn(3, 128, requires_grad=True)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    found, x.grad = x.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_one_product_in_an_exported_graph():
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    for model, products in ((Attention(), 1), (Changed(), 2)):
        with torch.no_grad():
            program = torch.export.export(model, (torch.randn(3, 128),), dynamic_shapes=dynamic)
            assert operators(program.graph) == ["mpq.linear.default"] * products
            y = torch.randn(7, 128)
            assert torch.equal(program.module()(y), model(y))
            assert torch.equal(program.run_decompositions({}).module()(y), model(y))


def test_strict_export_has_no_operator_of_this_package_alone():
    model, x = Attention(), torch.randn(3, 128)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=True)
        assert operators(program.graph) == ["mpq.linear.default"] * 3
        assert torch.equal(program.module()(x), model(x))


def test_members_look_like_linears_and_own_nothing():
    model = Attention()
    member = model.k_proj
    assert (member.in_features, member.out_features) == (128, 32)
    assert member.weight.shape == (32, 128) and torch.equal(member.bias, model.qkv_proj.bias[96:128])
    assert torch.equal(member.dequantize(), model.alone[1].dequantize())
    assert torch.equal(member.packed.qweight, model.alone[1].packed.qweight)
    assert "rows 96..128" in repr(member)
    assert sorted(model.state_dict()) == [f"qkv_proj.{n}" for n in ("bias", "qweight", "scales", "zeros")]


def test_copies_keep_members_on_their_own_weight():
    model, x = Attention(), torch.randn(2, 128)
    with torch.no_grad():
        model.q_proj(x)  # leaves outputs of two members waiting
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.q_proj.fused is twin.qkv_proj and twin.qkv_proj is not model.qkv_proj
            assert torch.equal(twin(x), expected(model, x))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([Member("a", 0, 96)], "members cover 96 of 168 rows"),
        ([Member("a", 0, 90), Member("b", 90, 168)], "end between row bands"),
        ([Member("a", 0, 96), Member("b", 128, 168)], "must follow each other"),
        ([Member("a", 0, 96), Member("a", 96, 168)], "repeat a name"),
    ],
)
def test_members_must_tile_the_rows(members, words):
    with pytest.raises(FormatError, match=words):
        FusedLinear(Attention().qkv_proj.layout, members)
