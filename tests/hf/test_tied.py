"""tie_weights(), which evaluation programs call on every model, on a model whose head is packed and no longer tied."""

import pytest
import torch

import mpq_kernels as mpq
from mpq_kernels.dense.names import list_linears
from tests.made.checkpoints import tiny_model


def packed_model(way, path, head):
    """A tied Qwen2 with 8 bits everywhere and `head` bits in the head, packed in memory or through a directory."""
    model = tiny_model("qwen2", path / "source", tied=True)
    plan = mpq.Plan.uniform(list_linears(model), bits=8, group_size=-1, lm_head=head)
    if way == "in memory":
        mpq.replace_linears(model, plan, "rtn")
        return model
    mpq.pack(path / "source", path / "packed", plan, quantizer="rtn")
    return mpq.load(path / "packed")


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15)[None]).logits


@pytest.mark.parametrize("way", ["in memory", "loaded"])
def test_a_packed_head_stays_packed(way, tmp_path):
    model = packed_model(way, tmp_path, head=6)
    before, head, embedding = logits(model), model.lm_head, model.model.embed_tokens.weight
    model.tie_weights()
    assert model.lm_head is head and isinstance(head, mpq.MixedLinear)
    assert model.model.embed_tokens.weight is embedding
    assert torch.equal(logits(model), before)


def test_saving_and_loading_after_tie_weights(tmp_path):
    model = packed_model("loaded", tmp_path, head=6)
    model.tie_weights()
    model.save_pretrained(tmp_path / "again")
    again = mpq.load(tmp_path / "again")
    again.tie_weights()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("way", ["in memory", "loaded"])
def test_a_kept_head_stays_tied(way, tmp_path):
    model = packed_model(way, tmp_path, head=16)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_only_the_packed_of_several_tied_weights_is_let_go(tmp_path):
    model = tiny_model("llama", tmp_path, tied=True)
    model.other = torch.nn.Embedding(*model.model.embed_tokens.weight.shape)
    pairs = {"lm_head.weight": "model.embed_tokens.weight", "other.weight": "model.embed_tokens.weight"}
    model._tied_weights_keys, model.all_tied_weights_keys = pairs, dict(pairs)
    mpq.replace_linears(model, mpq.Plan.uniform(list_linears(model), bits=8, group_size=-1, lm_head=8), "rtn")
    model.tie_weights()
    assert isinstance(model.lm_head, mpq.MixedLinear)
    assert model.other.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" in type(model)._tied_weights_keys, "other models of the class are not concerned"
