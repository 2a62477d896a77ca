"""What `load` would refuse is refused before any work; what the model does not use is kept and named."""

import os

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mpq_kernels as mpq
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.packer import pack as pack_model
from tests.made.checkpoints import SIZES, tiny_model
from tests.made.packed import UNIFORM

AUDIO = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | dict.fromkeys(
    ("d_model", "encoder_ffn_dim", "decoder_ffn_dim", "max_target_positions"), 64
)
AUDIO |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
AUDIO |= {"vocab_size": 160, "num_mel_bins": 8, "max_source_positions": 16, "pad_token_id": 0, "bos_token_id": 1}
# class -> (its config, an input, packed weights: all linears but the head)
CLASSES = {
    "Qwen3ForSequenceClassification": (
        transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True, num_labels=3),
        {"input_ids": torch.arange(3, 9)[None]},
        14,
    ),
    "Qwen3Model": (transformers.Qwen3Config(**SIZES, head_dim=16), {"input_ids": torch.arange(3, 9)[None]}, 14),
    "WhisperForConditionalGeneration": (
        transformers.WhisperConfig(**AUDIO, eos_token_id=2, decoder_start_token_id=1),
        {"input_features": torch.ones(1, 8, 32), "decoder_input_ids": torch.arange(3, 9)[None]},
        16,
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_class_that_config_names_is_packed_and_loaded(name, tmp_path):
    config, inputs, count = CLASSES[name]
    torch.manual_seed(0)
    dense = getattr(transformers, name)(config).eval()
    dense.save_pretrained(tmp_path / "model")
    plan = mpq.Plan.uniform(tmp_path / "model", bits=8, group_size=16, towers=8)
    report = mpq.pack(tmp_path / "model", tmp_path / "out", plan, quantizer="rtn")
    assert len(report.modules) == count and report.unused == ()
    model = mpq.load(tmp_path / "out")
    assert type(model).__name__ == name
    for module_name, module in model.named_modules():
        if isinstance(module, mpq.MixedLinear):
            dense.get_submodule(module_name).weight.data = module.dequantize()
    with torch.no_grad():
        found, wanted = model(**inputs)[0], dense(**inputs)[0]
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()  # fp32 sums in another order: tens of roundings of 2**-24


def llama_with(path, change):
    tiny_model("llama", path, tied=False)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["v_head.summary.weight", "step", "model.layers.0.mlp.output_scale"])
def test_unused_tensors_are_kept_and_named(name, tmp_path):
    llama_with(tmp_path / "model", lambda tensors: tensors.update({name: torch.full((1, 64), 0.5)}))
    report = mpq.pack(tmp_path / "model", tmp_path / "out", UNIFORM, quantizer="rtn")
    assert report.unused == (name,) and report.to_dict()["unused"] == (name,)
    assert torch.equal(PackedCheckpoint.open(tmp_path / "out").read(name), torch.full((1, 64), 0.5))
    assert type(mpq.load(tmp_path / "out")).__name__ == "LlamaForCausalLM"


def lose_a_norm(tensors):
    """With another tensor left over, which might have been renamed to it."""
    tensors["step"] = tensors.pop("model.norm.weight")


# name -> (change to the tensors, parts of the message)
REFUSED = {
    "scale beside a linear": (
        lambda t: t.update({"model.layers.0.self_attn.k_proj.output_scale": torch.ones(1)}),
        ["model.safetensors", "k_proj.output_scale", "k_proj is to be packed", "has no output_scale there", "bits=16"],
    ),
    "bias that config.json denies": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
        ["q_proj.bias", "q_proj is to be packed", "has no bias there"],
    ),
    "missing, and may be renamed": (
        lose_a_norm,
        ["transformers did not load the model whole: missing_keys: model.norm.weight"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_load_would_refuse_is_refused_before_any_work(case, tmp_path, monkeypatch):
    change, parts = REFUSED[case]
    llama_with(tmp_path / "model", change)
    monkeypatch.setattr(pack_model, "write_parts", None)
    with pytest.raises(mpq.CheckpointError) as caught:
        mpq.pack(tmp_path / "model", tmp_path / "out", UNIFORM, quantizer="rtn")
    assert all(part in str(caught.value) for part in parts)
    assert os.listdir(tmp_path) == ["model"]


def test_a_linear_that_is_kept_may_have_a_tensor_beside_it(tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    llama_with(tmp_path / "model", lambda tensors: tensors.update({f"{name}.bias": torch.zeros(64)}))
    rules = {"version": 1, "default": {"bits": 4, "group_size": -1}, "modules": {name: {"bits": 16}}}
    report = mpq.pack(tmp_path / "model", tmp_path / "out", mpq.Plan.from_dict(rules), quantizer="rtn")
    assert report.unused == (f"{name}.bias",)
    mpq.load(tmp_path / "out")
