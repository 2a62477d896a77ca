"""A packed checkpoint in a model of another class: its base model, that with another head, and the way back."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import mpq_kernels as mpq
from mpq_kernels.checkpoint import PackedCheckpoint
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.hf.fit import fit_names
from mpq_kernels.nn.linear import packed_modules
from tests.made.checkpoints import tiny_model
from tests.made.twins import dequantized_twin

IDS = torch.arange(3, 15)[None]


def pack(source, out):
    """5 bits everywhere, head included, q/k/v fused."""
    fuse = [{"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]}]
    plan = {"version": 1, "default": {"bits": 5, "group_size": 16}, "fuse": fuse}
    mpq.pack(source, out, mpq.Plan.model_validate(plan), quantizer="rtn")
    return out


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """(dense, packed): a Qwen3 whose head is its own, and packed."""
    root = tmp_path_factory.mktemp("causal")
    tiny_model("qwen3", root / "source", tied=False)
    return root / "source", pack(root / "source", root / "packed")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """The packed directories of a tied Qwen3: as it was packed, and as its base model saved it."""
    root = tmp_path_factory.mktemp("tied")
    tiny_model("qwen3", root / "source", tied=True)
    whole = pack(root / "source", root / "whole model")
    AutoModel.from_pretrained(whole).save_pretrained(root / "base model")
    return root


def hidden_states(model):
    with torch.no_grad():
        return model(input_ids=IDS).last_hidden_state


def close(got, wanted):
    return (got - wanted).norm() <= 1e-5 * wanted.norm()  # fp32 sums in another order


@pytest.fixture(scope="module", params=["qwen3", "mixtral"])
def untied(request, causal, tmp_path_factory):
    """The same of two families, one with experts."""
    if request.param == "qwen3":
        return causal
    root = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, root / "source", tied=False)
    return root / "source", pack(root / "source", root / "packed")


def test_the_base_model_of_a_packed_causal_model(untied, caplog):
    source, packed = untied
    with caplog.at_level(logging.WARNING, "mpq_kernels"):
        model = AutoModel.from_pretrained(packed)
    assert "has no place for these packed modules: lm_head" in caplog.text
    whole = mpq.load(packed)
    assert len(packed_modules(model)) == len(packed_modules(whole)) - 1
    assert torch.equal(hidden_states(model), hidden_states(whole.model))
    assert close(hidden_states(model), hidden_states(dequantized_twin(model, source, AutoModel)))


def base_checkpoint(path):
    """A dense directory that was saved from the base model: its names have no prefix, and no head is stored."""
    tiny_model("qwen3", path, tied=True).model.save_pretrained(path)
    assert all(not name.startswith("model.") for name in DenseCheckpoint.open(path).tensors)
    return path


def test_a_checkpoint_of_the_base_model(tmp_path):
    source = base_checkpoint(tmp_path / "source")
    packed = pack(source, tmp_path / "packed")
    base, whole = AutoModel.from_pretrained(packed), mpq.load(packed)
    assert close(hidden_states(base), hidden_states(dequantized_twin(base, source, AutoModel)))
    with torch.no_grad():
        assert close(whole(IDS).logits, dequantized_twin(whole, source)(IDS).logits)


def test_a_saved_base_model_loads_with_and_without_a_head(tied):
    saved, wanted = PackedCheckpoint.open(tied / "base model"), hidden_states(mpq.load(tied / "whole model").model)
    assert "layers.0.self_attn.qkv_proj" in saved.modules and "lm_head" not in saved.modules
    assert torch.equal(hidden_states(AutoModel.from_pretrained(tied / "base model")), wanted)
    whole = mpq.load(tied / "base model")
    assert torch.equal(hidden_states(whole.model), wanted)
    assert whole.lm_head.weight is whole.model.embed_tokens.weight


def test_another_head(causal):
    _, packed = causal
    model = AutoModelForSequenceClassification.from_pretrained(packed, num_labels=3)
    assert torch.equal(hidden_states(model.model), hidden_states(mpq.load(packed).model))
    with torch.no_grad():
        assert model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("saved_from", ["base model", "whole model"])
def test_a_module_of_the_base_model_is_never_left_out(auto, saved_from, tied, tmp_path):
    path = shutil.copytree(tied / saved_from, tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(mpq.CheckpointError, match=r"layers\.1\..* is packed .* has no such module"):
        auto.from_pretrained(path)


def test_a_head_that_its_own_class_lacks_is_refused(causal, tmp_path):
    path = shutil.copytree(causal[1], tmp_path / "copy")
    text = (path / "config.json").read_text().replace('"lm_head"', '"embed_out"')
    (path / "config.json").write_text(text)
    file = path / "model.safetensors"
    save_file({k.replace("lm_head.", "embed_out."): v.clone() for k, v in load_file(file).items()}, file)
    with pytest.raises(mpq.CheckpointError, match="embed_out is packed in this checkpoint"):
        mpq.load(path)


def test_two_spellings_of_one_module_are_refused(tied):
    packing = PackedCheckpoint.open(tied / "base model").packing
    name, module = next(iter(packing.modules.items()))
    twice = replace(packing, modules={**packing.modules, f"model.{name}": replace(module, name=f"model.{name}")})
    with pytest.raises(mpq.CheckpointError, match="is the same module of a Qwen3Model"):
        fit_names(twice, AutoModel.from_pretrained(tied / "base model"))
