"""Models of random packed weights: made from config.json alone, finite, reproducible, never dense."""

import json
import shutil

import pytest
import torch

import mpq_kernels as mpq
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.errors import CheckpointError, PlanError, UnsupportedError
from mpq_kernels.evaluate.synthetic import config_linears, synthetic_model
from mpq_kernels.format.layout import WeightLayout
from mpq_kernels.format.random import random_weight
from mpq_kernels.format.reference import dequantize
from mpq_kernels.hf.compiled import cache_name
from mpq_kernels.nn.linear import packed_modules
from mpq_kernels.plan.resolve import resolve
from tests.made.checkpoints import FAMILIES, tiny_model

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
MIXED = {
    "version": 1,
    "default": {"bits": 3, "group_size": 32, "zero": "float"},
    "modules": {
        "re:.*v_proj": {"bits": 5, "symmetric": True, "group_size": -1},
        "re:.*o_proj": {"bits": 4, "segments": [{"cols": [0, 64], "bits": 8}], "perm": list(range(63, -1, -1))},
        "re:.*down_proj": {"bits": 16},
        "lm_head": {"bits": 6, "group_size": -1},
    },
    "fuse": [{"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]}],
}


def config_only(family, path, **options):
    """A directory with nothing but a config.json."""
    tiny_model(family, path / "dense", **options)
    (path / "bare").mkdir()
    shutil.copy(path / "dense" / "config.json", path / "bare")
    return path / "bare"


def plan_of(bits, path, group=-1, **words):
    return mpq.Plan.uniform(config_linears(path), bits=bits, group_size=group, **words)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zero", ["none", "int", "float"])
def test_random_weights_have_mean_0_and_variance_1_over_k(bits, zero):
    if (bits, zero) == (1, "none"):
        pytest.skip("symmetric codes of one bit are 0 and -1: their mean is not 0")
    layout = WeightLayout.uniform(128, 1024, bits, 64, zero)
    weight = random_weight(layout, "cpu", torch.Generator().manual_seed(0))
    weight.check_values()
    values = dequantize(weight)
    deviation = values.std().item() * 1024**0.5
    assert 0.9 < deviation < 1.1
    # Symmetric codes have one more negative value than positive ones, half a step from 0 on average.
    step = 2 / 2**bits if zero == "none" else 0
    assert abs(values.mean().item()) * 1024**0.5 < 0.02 + step * 1.1
    again = random_weight(layout, "cpu", torch.Generator().manual_seed(0))
    assert torch.equal(again.qweight, weight.qweight) and torch.equal(again.scales, weight.scales)
    other = random_weight(layout, "cpu", torch.Generator().manual_seed(1))
    assert not torch.equal(other.qweight, weight.qweight)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_random_weights_of_large_k_keep_normal_scales(scale_dtype):
    layout = WeightLayout.uniform(64, 1 << 16, 8, 64, "float", scale_dtype, permuted=True)
    weight = random_weight(layout, "cpu", torch.Generator().manual_seed(0))
    weight.check_values()
    assert weight.scales.float().min() >= 2.0**-14
    assert torch.equal(weight.perm.sort().values, torch.arange(1 << 16, dtype=torch.int32))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_from_its_config_alone(family, tmp_path):
    path = config_only(family, tmp_path)
    plan = plan_of(3, path, lm_head=4)
    model = synthetic_model(path, plan)
    with torch.no_grad():
        logits = model(IDS).logits
        name = cache_name(model)
        cache = getattr(model(IDS[:, :-1], use_cache=True), name)
        stepped = model(IDS[:, -1:], **{name: cache}).logits
    assert logits.isfinite().all() and logits.std() > 1e-3
    torch.testing.assert_close(stepped[:, 0], logits[:, -1], rtol=1e-3, atol=1e-4 * float(logits.abs().max()))
    wanted = {w.name: w.layout for w in resolve(plan, DenseCheckpoint.open(tmp_path / "dense").linears()).weights}
    assert {name: layer.layout for name, layer in packed_modules(model)} == wanted
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_packed_is_built_as_transformers_builds_it(family, tmp_path):
    """With the dense model's parameters in place of the random ones, the logits are the dense model's."""
    path = config_only(family, tmp_path)
    dense = tiny_model(family, tmp_path / "again")
    model = synthetic_model(path, plan_of(16, path), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=True)
    assert not missing and not unexpected
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=0, atol=0)


def test_a_mixed_plan_gives_the_bytes_that_it_promises(tmp_path):
    path = config_only("qwen2", tmp_path, tied=True)
    plan = mpq.Plan.from_dict(MIXED)
    seen = []
    model = synthetic_model(path / "config.json", plan, seed=5, progress=lambda *call: seen.append(call))
    layers = dict(packed_modules(model))
    resolved = resolve(plan, config_linears(path))
    assert {n: layer.layout for n, layer in layers.items()} == {w.name: w.layout for w in resolved.weights}
    stored = sum(t.nbytes for layer in layers.values() for t in layer.packed.tensors().values())
    assert stored == resolved.size().total_bytes
    assert seen == [(i + 1, len(layers), name) for i, name in enumerate(layers)]
    assert model.model.layers[0].self_attn.qkv_proj.bias is not None  # qwen2's q, k and v have one
    assert model.lm_head.layout.segments[0].bits == 6  # the tied head is packed, the embedding stays
    assert model.model.embed_tokens.weight.shape == (160, 64)
    again = synthetic_model(path, plan, seed=5)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_dtype_is_the_configs_unless_another_is_asked_for(tmp_path):
    path = config_only("llama", tmp_path, dtype=torch.float16)
    plan = plan_of(4, path)
    assert synthetic_model(path, plan).dtype == torch.float16
    model = synthetic_model(path, plan, dtype=torch.float32)
    assert model.dtype == torch.float32 and model(IDS).logits.dtype == torch.float32
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")})
    )
    assert synthetic_model(path, plan).dtype == torch.bfloat16


def test_the_config_of_a_packed_model_is_a_plan(tmp_path):
    path = config_only("llama", tmp_path)
    plan = mpq.Plan.from_dict(MIXED)
    mpq.pack(tmp_path / "dense", tmp_path / "packed", plan, quantizer="rtn")
    (tmp_path / "config").mkdir()
    shutil.copy(tmp_path / "packed" / "config.json", tmp_path / "config")
    model = synthetic_model(tmp_path / "config", None)
    real = mpq.load(tmp_path / "packed")
    shapes = {name: (value.shape, value.dtype) for name, value in real.state_dict().items()}
    assert {name: (value.shape, value.dtype) for name, value in model.state_dict().items()} == shapes
    with pytest.raises(UnsupportedError, match="says itself"):
        synthetic_model(tmp_path / "config", plan)
    with pytest.raises(UnsupportedError, match="give a plan"):
        synthetic_model(path, None)


def test_memory_stays_at_the_packed_size(tmp_path, monkeypatch):
    """No tensor as large as a dense weight is ever made; a model that does not fit is refused before any is."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024}
    path = config_only("llama", tmp_path, sizes=sizes)
    largest = []
    make = torch.empty

    def watched(*args, **kwargs):
        tensor = make(*args, **kwargs)
        largest.append(0 if tensor.is_meta else tensor.nbytes)
        return tensor

    plan = plan_of(2, path, group=64, lm_head=2)
    monkeypatch.setattr(torch, "empty", watched)
    synthetic_model(path, plan)
    assert 0 < max(largest) <= 1024 * 512 * 2 / 8
    monkeypatch.setattr("mpq_kernels.evaluate.synthetic._available_memory", lambda: 100_000)
    largest.clear()
    with pytest.raises(UnsupportedError, match=r"100,000 bytes free: use fewer bits"):
        synthetic_model(path, plan)
    assert max(largest, default=0) == 0


def test_refusals(tmp_path):
    path = config_only("llama", tmp_path)
    cases = [
        (lambda: synthetic_model(path, plan_of(4, path), backend="nonsense"), UnsupportedError, "no backend"),
        (lambda: synthetic_model(path, plan_of(16, path), backend="cpu"), UnsupportedError, "nothing is packed"),
        (lambda: synthetic_model(path, plan_of(4, path, group=48)), PlanError, "does not divide"),
        (lambda: synthetic_model(path / "nowhere", None), CheckpointError, "not a directory"),
        (lambda: config_linears(tmp_path / "dense" / "model.safetensors"), CheckpointError, "config.json"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
