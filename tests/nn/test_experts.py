"""PackedExperts: what transformers' eager code computes with the dequantized weights of every expert."""

import copy
import pickle

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import mpq_kernels as mpq
from mpq_kernels.dense.experts import experts_modules
from mpq_kernels.format.weights import QuantizedWeight
from mpq_kernels.format.words import pack_weight
from mpq_kernels.nn.experts import GroupedLinear, PackedExperts
from tests.made.checkpoints import MIXTURES, SIZES
from tests.made.mixtures import fill_experts
from tests.made.weights import random_weight


def layer_of(family):
    """(PackedExperts with random weights, the family's own module with the dequantized ones, run eagerly)."""
    config_class, extra = MIXTURES[family]
    config = config_class(**(SIZES | extra), experts_implementation="eager")
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[config_class](config)
    dense = next(iter(experts_modules(model).values()))
    count, half = dense.num_experts, dense.down_proj.numel() // dense.num_experts // 64
    gates = [random_weight(half, 64, 1 + i % 8, 16, seed=i) for i in range(2 * count)]
    downs = [random_weight(64, half, 1 + i % 8, 16, seed=i) for i in range(count)]
    biases = [None, None]
    if dense.has_bias:
        biases = [torch.randn(count, 2 * half) * 4, torch.randn(count, 64)]
        dense.gate_up_proj_bias.data[:, 0::2] = biases[0][:, :half]
        dense.gate_up_proj_bias.data[:, 1::2] = biases[0][:, half:]
        dense.down_proj_bias.data = biases[1]
        biases = [bias.reshape(-1) for bias in biases]
    layers = [
        GroupedLinear.from_stacked(pack_weight(QuantizedWeight.stack(part)), count, bias, dtype=torch.float32)
        for part, bias in zip((gates, downs), biases, strict=True)
    ]
    packed = PackedExperts(*layers, copy.deepcopy(dense))
    fill_experts(dense, packed)
    return packed, dense


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("spread", ["random", "one expert", "no tokens", "one token"])
def test_the_module_equals_the_eager_code(family, spread):
    packed, dense = layer_of(family)
    tokens = {"random": 37, "one expert": 9, "no tokens": 0, "one token": 1}[spread]
    x, weights = torch.randn(tokens, 64), torch.rand(tokens, 2)
    chosen = torch.stack([torch.randperm(packed.num_experts)[:2] for _ in range(tokens)] or [torch.zeros(2)])[:tokens]
    chosen = chosen.long()
    if spread == "one expert":
        chosen = torch.full((tokens, 1), 1)
        weights = weights[:, :1]
    with torch.no_grad():
        y, wanted = packed(x, chosen, weights), dense(x, chosen, weights)
        again = packed(x, chosen, weights)
    assert y.shape == wanted.shape == (tokens, 64) and torch.equal(y, again)
    # Sums of 64 and of `half` products in fp32, in another order, and then of two experts.
    assert (y - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gradients_reach_tokens_and_routing_weights(family):
    packed, dense = layer_of(family)
    grads = []
    for module_ in (packed, dense):
        torch.manual_seed(1)
        x = (torch.randn(11, 64) * 0.02).requires_grad_()  # small, so that no gate is clamped or at its end
        weights = torch.rand(11, 2, requires_grad=True)
        chosen = torch.stack([torch.randperm(packed.num_experts)[:2] for _ in range(11)])
        module_(x, chosen, weights).square().sum().backward()
        grads.append((x.grad, weights.grad))
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_stacked_weights_without_values_and_those_that_went_away():
    packed, _ = layer_of("mixtral")
    layer, offsets = packed.gate_up, torch.tensor([0, 2, 3, 5], dtype=torch.int32)
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x, offsets)
    wanted = torch.cat([layer.dequantize_expert(e).sum(0).expand(n, -1) for e, n in ((0, 2), (1, 1), (2, 2))])
    for name, tensor in layer.packed.tensors().items():  # as offloading does after the forward pass
        layer._buffers[name] = tensor.to("meta")
    y.sum().backward()
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-3)
    with pytest.raises(mpq.UnsupportedError, match="the packed weight on the meta device"):
        layer(x, offsets)


def test_copies_pickles_and_casts_keep_the_packed_tensors():
    packed, _ = layer_of("gpt_oss")
    x, chosen, weights = torch.randn(5, 64), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    wanted = packed(x, chosen, weights)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(x, chosen, weights), wanted)
    cast = copy.deepcopy(packed).to(torch.bfloat16)
    assert cast.gate_up.scales.dtype == torch.float16 and cast.gate_up.bias.dtype == torch.bfloat16
    y = cast(x.bfloat16(), chosen, weights.bfloat16())
    # bf16 of x, the biases, both projections and the weights: five roundings of 2**-9, and a margin of 4.
    assert y.dtype == torch.bfloat16 and (y.float() - wanted).norm() <= 20 * 2.0**-9 * wanted.norm()
    assert "experts=4" in repr(packed.gate_up)


def test_compiled_experts_give_the_same_values():
    packed, _ = layer_of("qwen3_moe")
    x, chosen, weights = torch.randn(5, 64), torch.tensor([[3, 1]] * 5), torch.rand(5, 2)
    with torch.no_grad():
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, chosen, weights), packed(x, chosen, weights))


def test_layers_that_do_not_fit_are_refused():
    packed, dense = layer_of("mixtral")
    with pytest.raises(mpq.FormatError, match="the model wants 3, 576 x 64"):
        PackedExperts(packed.down, packed.down, dense)
    with pytest.raises(mpq.FormatError, match="192 rows do not share out among 5 experts"):
        GroupedLinear.from_stacked(packed.down.packed, 5)
    with pytest.raises(mpq.FormatError, match="lie in two experts"):
        GroupedLinear.from_stacked(packed.down.packed, 6)
    with pytest.raises(mpq.FormatError, match="offsets must say"):
        packed.gate_up(torch.randn(2, 64))
