"""Experts of a mixture as its files hold them: which module, which tensors, in which form, and what is refused."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mpq_kernels as mpq
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.dense.experts import experts_modules, why_not_packable
from mpq_kernels.dense.names import list_linears
from mpq_kernels.evaluate.synthetic import config_linears
from tests.made.checkpoints import MIXTURES, tiny_model

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A tiny Mixtral on disk: two layers of three experts."""
    path = tmp_path_factory.mktemp("mixture")
    return path, tiny_model("mixtral", path)


def test_every_expert_is_listed_as_stored(mixture):
    experts = [spec for spec in DenseCheckpoint.open(mixture[0]).linears() if spec.expert]
    assert len(experts) == 2 * 3 * 3
    by_name = {spec.name: spec for spec in experts}
    assert (by_name[EXPERT].out_features, by_name[EXPERT].in_features) == (96, 64)
    assert by_name[EXPERT.replace("w1", "w2")].tensor == EXPERT.replace("w1", "w2") + ".weight"
    assert [spec.expert.part for spec in experts[:3]] == ["gate", "up", "down"]


def test_experts_of_another_form_are_named_and_kept(mixture, tmp_path, monkeypatch):
    monkeypatch.setattr("mpq_kernels.packer.report.LARGE", 20_000)
    monkeypatch.setattr("mpq_kernels.dense.experts.why_not_packable", lambda experts: "its experts have a norm")
    source = DenseCheckpoint.open(mixture[0])
    assert not any(spec.expert for spec in source.linears())
    plan = mpq.Plan.from_dict({"version": 1, "default": {"bits": 4, "group_size": 32}})
    with pytest.raises(mpq.CheckpointError, match=r"MixtralExperts \(such as .*; its experts have a norm"):
        mpq.pack(mixture[0], tmp_path / "out", plan, quantizer="rtn")
    report = mpq.pack(mixture[0], tmp_path / "out", plan, quantizer="rtn", allow_dense=True)
    named = {parameter.name: (parameter.elements, parameter.reason) for parameter in report.large}
    assert named == {f"model.layers.{i}.mlp.experts.gate_up_proj": (36864, "its experts have a norm") for i in (0, 1)}


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [("has_gate", False, "hold"), ("has_post_expert_norm", True, "a norm behind"), ("has_bias", True, "hold")],
)
def test_why_an_experts_module_is_not_packable(mixture, attribute, value, words):
    experts = copy.deepcopy(next(iter(experts_modules(mixture[1]).values())))
    assert why_not_packable(experts) is None
    setattr(experts, attribute, value)
    assert words in why_not_packable(experts)


@pytest.mark.parametrize("change", ["missing", "shape", "dtype"])
def test_sources_with_a_bad_expert_are_refused(mixture, tmp_path, change):
    shutil.copytree(mixture[0], tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = f"{EXPERT}.weight"
    words = {
        "missing": "no file holds the gate weight of expert 2 of model.layers.1.mlp.experts",
        "shape": r"has \[96, 64\] for the gate weight of expert 2",
        "dtype": "weights must be fp32, fp16 or bf16",
    }
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:95].clone() if change == "shape" else tensors[name].to(torch.int8)
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(mpq.CheckpointError, match=words[change]):
        DenseCheckpoint.open(tmp_path / "m").linears()


@pytest.mark.parametrize("family", MIXTURES)
def test_a_model_in_memory_and_its_files_list_the_same_linears(family, tmp_path):
    model = tiny_model(family, tmp_path / "m")
    stored = [(s.name, s.out_features, s.in_features) for s in DenseCheckpoint.open(tmp_path / "m").linears()]
    assert stored == [(s.name, s.out_features, s.in_features) for s in list_linears(model)]
    assert stored == [(s.name, s.out_features, s.in_features) for s in config_linears(tmp_path / "m")]
