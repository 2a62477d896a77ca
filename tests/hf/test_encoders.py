"""Encoders, encoder-decoders and classifiers: heads that share the embedding, several embeddings that are one."""

import pytest
import torch
import transformers as hf

import mpq_kernels as mpq
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.nn.linear import MixedLinear, packed_modules
from tests.made.twins import dequantized_twin

IDS = torch.arange(3, 15)[None]
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 60}
T5 = {"d_model": 32, "d_ff": 48, "num_heads": 2, "d_kv": 16, "num_layers": 2, "vocab_size": 60}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 60,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
DEBERTA = BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
# (class, config, name of its head)
MODELS = {
    "BERT": (hf.BertForMaskedLM, hf.BertConfig(**BERT), "cls.predictions.decoder"),
    "RoBERTa": (hf.RobertaForMaskedLM, hf.RobertaConfig(**BERT, max_position_embeddings=40), "lm_head.decoder"),
    "ModernBERT": (hf.ModernBertForMaskedLM, hf.ModernBertConfig(**BERT, pad_token_id=0, bos_token_id=1), "decoder"),
    "DeBERTa": (hf.DebertaV2ForMaskedLM, hf.DebertaV2Config(**DEBERTA), "cls.predictions.decoder"),
    "T5": (hf.T5ForConditionalGeneration, hf.T5Config(**T5), "lm_head"),
    "BART": (hf.BartForConditionalGeneration, hf.BartConfig(**BART), "lm_head"),
    "Marian": (hf.MarianMTModel, hf.MarianConfig(**BART), "lm_head"),
    "a classifier": (hf.BertForSequenceClassification, hf.BertConfig(**BERT, num_labels=3), "classifier"),
}


@pytest.fixture(scope="module", params=MODELS)
def family(request, tmp_path_factory):
    """(its name, its dense directory)."""
    model_class, config, _ = MODELS[request.param]
    path = tmp_path_factory.mktemp("family") / "dense"
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # fresh norms are one and biases zero, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return request.param, path


@torch.no_grad()
def logits(model):
    words = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=IDS, **words).logits


def close(found, wanted):
    return (found - wanted).norm() <= 1e-5 * wanted.norm()  # fp32 sums in another order


@pytest.mark.parametrize("lm_head", [16, 5])
def test_logits_are_those_of_the_dequantized_model(family, lm_head, tmp_path):
    name, source = family
    model_class, config, head = MODELS[name]
    specs = {spec.name: spec for spec in DenseCheckpoint.open(source).linears()}
    assert [spec.name for spec in specs.values() if spec.is_head] == [head]
    assert specs[head].tied == (name != "a classifier")
    plan = mpq.Plan.uniform(source, bits=4, group_size=16, lm_head=lm_head)
    mpq.pack(source, tmp_path / "packed", plan, quantizer="rtn")
    model = mpq.load(tmp_path / "packed")
    assert type(model) is model_class
    assert len(packed_modules(model)) == len(specs) - (lm_head == 16)
    assert isinstance(model.get_submodule(head), MixedLinear) == (lm_head < 16)
    twin = dequantized_twin(model, source, model_class)
    twin.get_submodule(head).bias = model.get_submodule(head).bias
    found = logits(model)
    assert close(found, logits(twin))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(mpq.load(tmp_path / "again")), found)
    model.dequantize().save_pretrained(tmp_path / "plain")
    assert close(logits(model), found)
    assert torch.equal(logits(model_class.from_pretrained(tmp_path / "plain")), logits(model))


def test_generation(family, tmp_path):
    name, source = family
    if not MODELS[name][0].can_generate():
        pytest.skip("an encoder generates nothing")
    mpq.pack(source, tmp_path / "packed", mpq.Plan.uniform(source, 4, 16, lm_head=6), quantizer="rtn")
    model = mpq.load(tmp_path / "packed")
    words = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 2}
    wanted = dequantized_twin(model, source, type(model)).generate(IDS, **words)
    assert torch.equal(model.generate(IDS, **words), wanted)
