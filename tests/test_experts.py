"""Mixture models: experts are seen, named and kept; nothing about them is silent."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import mpq_kernels as mpq
from mpq_kernels.resolve import resolve
from mpq_kernels.source import SourceCheckpoint

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A tiny Mixtral on disk: two layers of three experts."""
    path = tmp_path_factory.mktemp("mixture")
    config = MixtralConfig(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(path)
    return path, model


def test_every_expert_is_listed_as_stored(mixture):
    experts = [spec for spec in SourceCheckpoint.open(mixture[0]).linears() if spec.expert]
    assert len(experts) == 2 * 3 * 3
    by_name = {spec.name: spec for spec in experts}
    assert (by_name[EXPERT].out_features, by_name[EXPERT].in_features) == (96, 64)
    assert by_name[EXPERT.replace("w1", "w2")].tensor == EXPERT.replace("w1", "w2") + ".weight"


def test_plans_size_experts_of_different_widths(mixture):
    plan = mpq.Plan.from_dict(
        {"version": 1, "modules": {r"re:.*\.experts\.\d+\.w2": {"bits": 2, "group_size": 32}, EXPERT: {"bits": 5}}}
    )
    resolved = resolve(plan, SourceCheckpoint.open(mixture[0]).linears())
    layouts = {weight.name: weight.layout for weight in resolved.weights}
    assert len(layouts) == 7 and layouts[EXPERT].segments[0].bits == 5
    assert layouts[EXPERT.replace("w1", "w2")].segments[0].bits == 2
    assert EXPERT.replace("w1", "w3") in resolved.kept


def test_uniform_keeps_and_reports_experts(mixture, tmp_path):
    path, model = mixture
    report = mpq.pack(path, tmp_path / "out", mpq.Plan.uniform(path, bits=8, group_size=32), quantizer="rtn")
    assert report.kept[EXPERT] == "plan: 16 bits" and len(report.kept) == 18 + 1
    loaded, ids = mpq.load(tmp_path / "out"), torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert (loaded(ids).logits - expected).norm() < 0.05 * expected.norm()
    state = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if "experts" in name:
            assert torch.equal(state[name], tensor), name


def test_packing_experts_is_refused_in_words(mixture, tmp_path):
    plan = mpq.Plan.from_dict({"version": 1, "default": {"bits": 4, "group_size": 32}})
    with pytest.raises(mpq.PlanError, match=r"widths to 18 linears of experts .* keep them, with the rule"):
        mpq.pack(mixture[0], tmp_path / "out", plan, quantizer="rtn")
    assert not (tmp_path / "out").exists()
