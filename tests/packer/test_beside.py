"""What lies beside the linears of a model: tensors that it does not use, and the folder of a sentence embedder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel

import mpq_kernels as mpq
from mpq_kernels.nn.linear import packed_modules
from tests.made.checkpoints import tiny_model
from tests.made.twins import dequantized_twin

IDS = torch.arange(3, 15)[None]


def mtp_layer(tensors):
    """A copy of the last layer behind it, and what joins the two, as DeepSeek-V3 stores its prediction module."""
    last = {name: t for name, t in tensors.items() if name.startswith("model.layers.1.")}
    added = {name.replace("layers.1.", "layers.2."): tensor for name, tensor in last.items()}
    return added | {
        "model.layers.2.eh_proj.weight": torch.ones(64, 128),
        "model.layers.2.enorm.weight": torch.ones(64),
        "model.layers.2.shared_head.head.weight": tensors["lm_head.weight"],
    }


def value_head(tensors):
    """A head beside the language model's, as trl stores it."""
    return {"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.ones(1)}


@pytest.mark.parametrize(("family", "make"), [("deepseek_v3", mtp_layer), ("llama", value_head)])
def test_tensors_that_the_model_does_not_use(family, make, tmp_path):
    tiny_model(family, tmp_path / "dense", tied=False)
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    added = make(tensors)
    save_file({name: tensor.clone() for name, tensor in (tensors | added).items()}, file, {"format": "pt"})
    plan = mpq.Plan.uniform(tmp_path / "dense", bits=4, group_size=-1)
    report = mpq.pack(tmp_path / "dense", tmp_path / "packed", plan, quantizer="rtn")
    assert set(report.unused) == set(added)
    written = load_file(tmp_path / "packed" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in added.items())
    model = mpq.load(tmp_path / "packed")
    with torch.no_grad():
        wanted = dequantized_twin(model, tmp_path / "dense")(IDS).logits
        assert (model(IDS).logits - wanted).norm() <= 1e-5 * wanted.norm()  # fp32 sums in another order


def test_a_sentence_embedder(tmp_path):
    """Its folder is carried whole, and the encoder in it gives the pooled vectors of the dequantized one."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    BertModel(BertConfig(vocab_size=60, **sizes)).save_pretrained(tmp_path / "dense")
    parts = [{"idx": 0, "path": "", "type": "Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "Pooling"}]
    files = {
        "modules.json": parts,
        "sentence_bert_config.json": {"max_seq_length": 16},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
        "2_Normalize/README.md": {},
    }
    for name, content in files.items():
        path = tmp_path / "dense" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    plan = mpq.Plan.uniform(tmp_path / "dense", bits=4, group_size=16)
    report = mpq.pack(tmp_path / "dense", tmp_path / "packed", plan, quantizer="rtn")
    assert set(files) <= set(report.copied)
    for name in files:
        if not name.endswith("README.md"):
            assert (tmp_path / "packed" / name).read_text() == (tmp_path / "dense" / name).read_text()
    model = mpq.load(tmp_path / "packed")
    assert type(model) is BertModel and len(packed_modules(model)) == 13  # six of each layer, and the pooler
    for loaded in (model, AutoModel.from_pretrained(tmp_path / "packed")):
        with torch.no_grad():
            found = loaded.eval()(IDS).last_hidden_state.mean(1)
            wanted = dequantized_twin(model, tmp_path / "dense", AutoModel)(IDS).last_hidden_state.mean(1)
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
