"""A config.json can ask for anything: labels, modules and memory are bounded, and every error is in words."""

import json
import shutil

import pytest
import torch

import mpq_kernels as mpq
from mpq_kernels.dense import model as dense_model
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.dense.model import build_meta_model, check_bytes, refused_by_transformers
from tests.made.checkpoints import tiny_model
from tests.made.packed import UNIFORM


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """family -> (dense directory, packed directory)."""
    root, out = tmp_path_factory.mktemp("bounds"), {}
    for family in ("llama", "phi3", "deepseek_v3"):
        tiny_model(family, root / family)
        mpq.pack(root / family, root / f"{family}-packed", UNIFORM, quantizer="rtn")
        out[family] = (root / family, root / f"{family}-packed")
    return out


def changed(path, tmp_path, **keys):
    """A copy whose config.json has other values."""
    copy = shutil.copytree(path, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | keys))
    return copy


# Each of them made `load` raise something else of transformers or of torch.
MALFORMED = {
    "type": ("llama", {"vocab_size": "many"}, "vocab_size"),
    "null": ("llama", {"hidden_act": None}, "transformers cannot build"),
    "unknown": ("llama", {"hidden_act": "gelulu"}, "gelulu"),
    "heads": ("llama", {"num_attention_heads": 0}, "transformers cannot build"),
    "labels": ("llama", {"id2label": [1], "label2id": 3}, "transformers cannot build"),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("which", ["dense", "packed"])
def test_what_transformers_raises_is_a_checkpoint_error(made, case, which, tmp_path):
    family, keys, words = MALFORMED[case]
    path = changed(made[family][which == "packed"], tmp_path, **keys)
    with pytest.raises(mpq.CheckpointError, match=words) as caught:
        mpq.load(path) if which == "packed" else DenseCheckpoint.open(path).linears()
    assert str(path / "config.json") in str(caught.value)


@pytest.mark.parametrize("where", ["top", "text_config"])
@pytest.mark.parametrize("which", ["dense", "packed"])
def test_absurdly_many_labels(made, which, where, tmp_path):
    """transformers would make a name for each of them."""
    keys = {"num_labels": 10**12} if where == "top" else {"text_config": {"num_labels": 10**12}}
    path = changed(made["llama"][which == "packed"], tmp_path, **keys)
    with pytest.raises(mpq.CheckpointError, match=r"config\.json: num_labels=1000000000000, more than 100000"):
        mpq.load(path) if which == "packed" else DenseCheckpoint.open(path).linears()


def test_absurdly_large_buffers(made, tmp_path):
    """Rotary frequencies of 10**12 columns: 2 TB, computed when the model is loaded."""
    path = changed(made["deepseek_v3"][1], tmp_path, head_dim=10**12)
    with pytest.raises(mpq.CheckpointError, match="bytes of buffers, and its files hold"):
        mpq.load(path)


def test_absurdly_many_modules(made, monkeypatch):
    monkeypatch.setattr(dense_model, "MAX_MODULES", 20)
    with pytest.raises(mpq.CheckpointError, match="more than 20 modules"):
        build_meta_model(made["llama"][0])
    monkeypatch.undo()
    assert sum(1 for _ in build_meta_model(made["llama"][0]).modules()) > 20
    with refused_by_transformers(made["llama"][0]):
        pass
    torch.nn.ModuleList(torch.nn.Identity() for _ in range(30))  # no limit is left behind


def test_absurdly_large_parameters(tmp_path):
    with torch.device("meta"):
        model = torch.nn.Linear(2**20, 2**10)
    check_bytes(tmp_path, model, 2**30)
    with pytest.raises(mpq.CheckpointError, match="bytes of parameters, and its files hold 1000 bytes"):
        check_bytes(tmp_path, model, 1000)
