"""A packed directory in a program that does not know this package: an error, and never a model of random weights."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import mpq_kernels as mpq
from mpq_kernels.checkpoint import PackedCheckpoint
from mpq_kernels.checkpoint.config import IMPORT_FIRST, WEIGHTS_KEY
from tests.made.checkpoints import tiny_model

IDS = torch.arange(3, 15)[None]
LOADERS = ("AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification", "{}ForCausalLM", "{}Model")
# Everything in one process: to import transformers takes seconds.
PROGRAM = """\
import json, sys, transformers
transformers.logging.set_verbosity_error()
out = {}
for folder, family, loaders in json.loads(sys.argv[1]):
    for loader in loaders:
        try:
            getattr(transformers, loader).from_pretrained(folder)
            out[f"{family} {loader}"] = "loaded"
        except Exception as error:
            out[f"{family} {loader}"] = f"{type(error).__name__}: {error}"
    try:
        transformers.pipeline("text-generation", folder)
        out[f"{family} pipeline"] = "loaded"
    except Exception as error:
        out[f"{family} pipeline"] = f"{type(error).__name__}: {error}"
assert "mpq_kernels" not in sys.modules
print(json.dumps(out))
"""
FAMILIES = {"qwen2": "Qwen2", "mixtral": "Mixtral", "phi3": "Phi3"}


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    """(family, who wrote it) -> packed directory, of several families; q/k/v of Qwen2 fused and its head packed."""
    found = {}
    for family in FAMILIES:
        root = tmp_path_factory.mktemp(family)
        tiny_model(family, root / "source", tied=True)
        plan = {"version": 1, "default": {"bits": 4, "group_size": 16}}
        if family == "qwen2":
            plan["fuse"] = [{"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]}]
        mpq.pack(root / "source", root / "packed", mpq.Plan.model_validate(plan), quantizer="rtn")
        AutoModelForCausalLM.from_pretrained(root / "packed").save_pretrained(root / "saved")
        AutoModel.from_pretrained(root / "packed").save_pretrained(root / "base", max_shard_size="30KB")
        found |= {(family, name): root / name for name in ("packed", "saved", "base")}
    return found


@pytest.mark.slow
def test_nothing_loads_a_packed_directory_without_the_package(dirs):
    jobs = []
    for (family, writer), path in dirs.items():
        loaders = [name.format(FAMILIES[family]) for name in LOADERS]
        jobs.append([str(path), f"{family} {writer}", loaders])
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(jobs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == len(dirs) * (len(LOADERS) + 1)
    for name, result in results.items():
        wanted = IMPORT_FIRST if " packed " in name else "ignore_mismatched_sizes"
        assert wanted in result and ("Could not load model" in result) == name.endswith("pipeline"), (name, result)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_package_all_of_them_load_in_silence(dirs, family, caplog):
    wanted = logits(mpq.load(dirs[family, "packed"]))
    for load in (mpq.load, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(load(dirs[family, "saved"])), wanted)
    caplog.clear()
    model, info = AutoModelForCausalLM.from_pretrained(dirs[family, "saved"], output_loading_info=True)
    assert not any(info.values()) and not hasattr(model.config, WEIGHTS_KEY)
    base, info = AutoModel.from_pretrained(dirs[family, "base"], output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_a_guard_is_no_tensor_of_the_model(dirs):
    packed, saved = (PackedCheckpoint.open(dirs["qwen2", name]) for name in ("packed", "saved"))
    stored = load_file(dirs["qwen2", "saved"] / "model.safetensors")
    extra = sorted(set(stored) - set(packed.tensors))
    assert extra == ["model.layers.0.self_attn.q_proj.weight"] and stored[extra[0]].numel() == 0
    assert saved.kept_tensors() == packed.kept_tensors()
    saved.size(), saved.verify_values()


def test_directories_that_were_packed_without_the_words_are_read(dirs, tmp_path):
    path = shutil.copytree(dirs["qwen2", "packed"], tmp_path / "older")
    config = json.loads((path / "config.json").read_text())
    assert config.pop(WEIGHTS_KEY) == IMPORT_FIRST
    (path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(mpq.load(path)), logits(mpq.load(dirs["qwen2", "packed"])))


def test_another_tensor_under_the_name_of_a_packed_weight_is_refused(dirs, tmp_path):
    path = shutil.copytree(dirs["qwen2", "packed"], tmp_path / "copy")
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: torch.zeros(1)}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(mpq.CheckpointError, match=re.escape(name) + ".* has no place for it"):
        mpq.load(path)
