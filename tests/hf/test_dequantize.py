"""`model.dequantize()`: a dense model of the very values that were packed, which plain transformers loads again."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import mpq_kernels as mpq
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.hf.dequantize import dequantize_model
from mpq_kernels.nn.linear import packed_modules
from mpq_kernels.nn.mlp import GatedMLP
from tests.made.checkpoints import tiny_model
from tests.made.twins import dequantized_twin

IDS = torch.arange(3, 15)[None]
FUSE = [
    {"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]},
    {"name": "gate_up_proj", "members": ["gate_proj", "up_proj"]},
]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def packed(source, out, lm_head=6, fuse=()):
    plan = mpq.Plan.uniform(source, bits=4, group_size=-1, lm_head=lm_head).model_dump(mode="json")
    mpq.pack(source, out, mpq.Plan.from_dict(plan | {"fuse": list(fuse)}), quantizer="rtn")
    return out


def check(model, source, path):
    """The model, now dense, is its own twin; saved, it is a checkpoint that knows nothing of packing."""
    twin = dequantized_twin(model, source, type(model))
    dense = model.dequantize()
    assert dense is model and not packed_modules(model) and not hasattr(model, "hf_quantizer")
    state, wanted = model.state_dict(), twin.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor), name
    model.save_pretrained(path)
    assert "quantization_config" not in (path / "config.json").read_text()
    again = type(model).from_pretrained(path)
    assert again.state_dict().keys() == wanted.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    return again


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "gpt_oss", "mixtral"])
def test_linears_fused_ones_and_experts(family, tied, tmp_path):
    tiny_model(family, tmp_path / "dense", tied=tied)
    fuse = FUSE if family == "qwen2" else FUSE[:1]
    model = mpq.load(packed(tmp_path / "dense", tmp_path / "packed", fuse=fuse))
    before = logits(model)
    again = check(model, tmp_path / "dense", tmp_path / "saved")
    assert (logits(model) - before).norm() <= 1e-5 * before.norm()  # fp32 sums in another order
    assert torch.equal(logits(again), logits(model))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    DenseCheckpoint.open(tmp_path / "saved").linears()  # can be packed again


def test_a_kept_tied_head_stays_tied(tmp_path):
    tiny_model("llama", tmp_path / "dense", tied=True)
    model = mpq.load(packed(tmp_path / "dense", tmp_path / "packed", lm_head=16))
    again = check(model, tmp_path / "dense", tmp_path / "saved")
    for each in (model, again):
        assert each.lm_head.weight is each.model.embed_tokens.weight and each.config.tie_word_embeddings


def test_linears_that_are_stored_transposed(tmp_path):
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense")
    model = mpq.load(packed(tmp_path / "dense", tmp_path / "packed"))
    before = logits(model)
    model.dequantize()
    assert type(model.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    assert (logits(model) - before).norm() <= 1e-5 * before.norm()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_a_base_model(tmp_path):
    tiny_model("qwen3", tmp_path / "dense")
    model = AutoModel.from_pretrained(packed(tmp_path / "dense", tmp_path / "packed"))
    wanted = dequantized_twin(model, tmp_path / "dense", AutoModel).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.dequantize().state_dict().items())


def test_another_dtype_is_that_of_the_whole_model(tmp_path):
    tiny_model("qwen2", tmp_path / "dense", dtype=torch.bfloat16)
    path = packed(tmp_path / "dense", tmp_path / "packed", fuse=FUSE)
    exact = mpq.load(path).model.layers[0].self_attn.qkv_proj.dequantize(torch.float32)[:64]
    rounded, whole = mpq.load(path).dequantize(), mpq.load(path).dequantize(torch.float32)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert torch.equal(whole.model.layers[0].self_attn.q_proj.weight, exact)
    assert torch.equal(rounded.model.layers[0].self_attn.q_proj.weight, exact.bfloat16())
    assert all(p.requires_grad for p in whole.parameters())


def test_gated_mlps_are_the_familys_again(tmp_path):
    tiny_model("llama", tmp_path / "dense")
    model = mpq.load(packed(tmp_path / "dense", tmp_path / "packed", fuse=FUSE))
    before, kind = logits(model), type(model.model.layers[0].mlp)
    for layer in model.model.layers:
        layer.mlp = GatedMLP(layer.mlp)
    dequantize_model(model)
    assert {type(layer.mlp) for layer in model.model.layers} == {kind}
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    assert (logits(model) - before).norm() <= 1e-5 * before.norm()


def test_what_cannot_be_made_dense(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="only a program that offloads needs it")
    tiny_model("llama", tmp_path / "dense")
    path = packed(tmp_path / "dense", tmp_path / "packed")
    model = accelerate.cpu_offload(mpq.load(path), execution_device=torch.device("cpu"), offload_buffers=True)
    with pytest.raises(mpq.UnsupportedError, match="is offloaded"):
        model.dequantize()
    model = mpq.load(path)
    model.model.layers[1].mlp.up_proj = nn.Sequential(model.model.layers[1].mlp.up_proj)
    with pytest.raises(mpq.UnsupportedError, match=r"up_proj\.0 is no linear of a LlamaForCausalLM"):
        model.dequantize()
    assert packed_modules(model)


@pytest.mark.parametrize(("family", "lm_head"), [("llama", 16), ("gemma", 16), ("llama", 6)])
def test_packed_embeddings(family, lm_head, tmp_path):
    """A head that shares the packed weight of the embedding shares the dense one; one of its own stays apart."""
    tiny_model(family, tmp_path / "dense", tied=True)
    plan = mpq.Plan.uniform(tmp_path / "dense", bits=5, group_size=-1, embeddings=4, lm_head=lm_head)
    mpq.pack(tmp_path / "dense", tmp_path / "packed", plan, quantizer="rtn")
    model = mpq.load(tmp_path / "packed")
    with pytest.raises(mpq.UnsupportedError, match=r"embed_tokens.* is packed with"):
        model.resize_token_embeddings(7)
    before = logits(model)
    model.dequantize().save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for each in (model, again):
        assert (logits(each) - before).norm() <= 1e-5 * before.norm()
        assert (each.lm_head.weight is each.model.embed_tokens.weight) == (lm_head == 16)
    assert torch.equal(logits(again), logits(model))


def test_float8(tmp_path):
    tiny_model("qwen2", tmp_path / "dense")
    rule = {"bits": 8, "dtype": "float8_e4m3fn"}
    plan = mpq.Plan.from_dict({"version": 1, "modules": {"re:.*self_attn.*": rule}})
    mpq.pack(tmp_path / "dense", tmp_path / "packed", plan, quantizer="rtn")
    model = mpq.load(tmp_path / "packed")
    before = logits(model)
    model.dequantize()
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    assert torch.equal(logits(model), before)
