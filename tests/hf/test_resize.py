"""`resize_token_embeddings`: as transformers does it where the head is kept, refused in words where it is packed."""

import copy
import pickle

import pytest
import torch

import mpq_kernels as mpq
from tests.made.checkpoints import VOCAB, tiny_model

IDS = torch.arange(3, 15)[None]


@pytest.mark.parametrize("tied", [True, False])
def test_with_a_kept_head(tied, tmp_path):
    tiny_model("llama", tmp_path / "dense", tied=tied)
    mpq.pack(tmp_path / "dense", tmp_path / "packed", mpq.Plan.uniform(tmp_path / "dense", 4, -1), quantizer="rtn")
    model = mpq.load(tmp_path / "packed")
    with torch.no_grad():
        before = model(IDS).logits
        model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
        assert torch.equal(model(IDS).logits[..., :VOCAB], before)
    assert model.lm_head.weight.shape == (VOCAB + 3, 64)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(mpq.load(tmp_path / "saved")(IDS).logits, model(IDS).logits)


@pytest.fixture(scope="module")
def packed_head(tmp_path_factory):
    root = tmp_path_factory.mktemp("resize")
    tiny_model("llama", root / "dense", tied=True)
    plan = mpq.Plan.uniform(root / "dense", 4, -1, lm_head=8)
    mpq.pack(root / "dense", root / "packed", plan, quantizer="rtn")
    return root / "packed"


@pytest.mark.parametrize("words", [{"new_num_tokens": VOCAB + 3}, {"pad_to_multiple_of": 64}, {"new_num_tokens": 9}])
def test_with_a_packed_head(packed_head, words):
    model = mpq.load(packed_head)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(mpq.UnsupportedError, match=f"lm_head is packed with {VOCAB} tokens and cannot be resized"):
            each.resize_token_embeddings(**words)
        assert each.get_input_embeddings().weight.shape == (VOCAB, 64)
    assert model.dequantize().resize_token_embeddings(**words).weight.shape[0] != VOCAB


@pytest.mark.parametrize("words", [{}, {"new_num_tokens": VOCAB}, {"new_num_tokens": 130, "pad_to_multiple_of": 32}])
def test_the_same_number_of_tokens(packed_head, words):
    for model in (mpq.load(packed_head), copy.deepcopy(mpq.load(packed_head))):
        assert model.resize_token_embeddings(**words) is model.get_input_embeddings()
