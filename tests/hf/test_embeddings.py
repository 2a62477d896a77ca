"""Packed embeddings on disk: packed, loaded, saved and loaded again, in models whose head is tied to them or not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import mpq_kernels as mpq
from mpq_kernels.calibrate.calibration import Calibration
from mpq_kernels.checkpoint import PackedCheckpoint
from mpq_kernels.checkpoint.packed import guards
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.errors import CheckpointError, PlanError
from mpq_kernels.nn import MixedEmbedding
from mpq_kernels.nn.embedding import TiedLinear
from mpq_kernels.nn.linear import packed_modules
from tests.made.checkpoints import FAMILIES, tiny_model
from tests.made.twins import dequantized_twin

IDS = torch.arange(3, 15)[None]
NAME = "model.embed_tokens"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def pack(path, tied, family="llama", quantizer="rtn", **words):
    """(dense, packed) directories of a model with 4 bits everywhere, embeddings too."""
    tiny_model(family, path / "source", tied=tied)
    plan = mpq.Plan.uniform(path / "source", bits=4, group_size=-1, embeddings=4)
    mpq.pack(path / "source", path / "packed", plan, quantizer=quantizer, **words)
    return path / "source", path / "packed"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_the_dequantized_model(family, tied, tmp_path):
    if family == "phi" and tied:
        pytest.skip("its head has a bias: the test of a tied head with a bias is in tests/nn")
    source, packed = pack(tmp_path, tied, family)
    model = mpq.load(packed)
    assert isinstance(model.get_input_embeddings(), MixedEmbedding)
    assert isinstance(model.lm_head, TiedLinear) == tied
    dense = dequantized_twin(model, source)
    if not tied:
        assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_stored_once_and_counted_once(tied, tmp_path):
    source, packed = pack(tmp_path, tied)
    held = PackedCheckpoint.open(packed)
    names = {name for name in held.tensors if name.startswith((NAME, "lm_head"))}
    assert names == {f"{NAME}.{key}" for key in ("qweight", "scales", "zeros")} | (
        set() if tied else {"lm_head.weight"}
    )
    assert held.modules[NAME].shared == (("lm_head",) if tied else ())
    entry = json.loads((packed / "config.json").read_text())["quantization_config"]["modules"][NAME]
    assert entry["embedding"] == {"shared": ["lm_head"] if tied else []}
    assert held.size().packed.weights == sum(
        s.out_features * s.in_features for s in DenseCheckpoint.open(source).packable()
    ) - (
        160 * 64 if tied else 160 * 64  # the head: it is the embedding, or it is kept
    )


def test_tie_weights_and_saving_leave_it_as_it_is(tmp_path):
    _, packed = pack(tmp_path, tied=True)
    model = mpq.load(packed)
    before, head = logits(model), model.lm_head
    model.tie_weights()
    assert model.lm_head is head and torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "again")
    again = mpq.load(tmp_path / "again")
    again.tie_weights()
    assert torch.equal(logits(again), before)
    saved = PackedCheckpoint.open(tmp_path / "again")
    guard = guards(saved.modules, saved.files)
    assert guard == ["model.layers.0.self_attn.q_proj.weight"]
    assert set(saved.tensors) - set(guard) == set(PackedCheckpoint.open(packed).tensors)


def test_the_base_model_and_the_way_back(tmp_path):
    _, packed = pack(tmp_path, tied=True)
    whole = mpq.load(packed)
    base = AutoModel.from_pretrained(packed)
    assert isinstance(base.embed_tokens, MixedEmbedding) and len(packed_modules(base)) == len(packed_modules(whole))
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert isinstance(again.lm_head, TiedLinear) and torch.equal(logits(again), logits(whole))


@pytest.mark.parametrize("tied", [True, False])
def test_offloading(tied, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="only a program that offloads needs it")
    _, packed = pack(tmp_path, tied)
    wanted = logits(mpq.load(packed))
    moved = accelerate.cpu_offload(mpq.load(packed), execution_device=torch.device("cpu"), offload_buffers=True)
    assert moved.model.embed_tokens.qweight.is_meta and torch.equal(logits(moved), wanted)
    split = {NAME: "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk" if tied else "cpu"}
    split |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    mapped = AutoModelForCausalLM.from_pretrained(
        packed, device_map=split, offload_folder=tmp_path / "o", offload_buffers=True
    )
    assert torch.equal(logits(mapped), wanted)


@pytest.mark.parametrize("quantizer", ["hqq", "gptq"])
def test_quantizers_without_inputs(quantizer, tmp_path):
    """With gptq, embeddings are quantized by hqq: they have no inputs."""
    words = {}
    if quantizer == "gptq":
        rows = torch.randint(3, 160, (4, 32), generator=torch.Generator().manual_seed(0))
        words["calibration"] = Calibration(tokens=rows)
    _, packed = pack(tmp_path / quantizer, True, quantizer=quantizer, **words)
    pack(tmp_path / "alone", True, quantizer="hqq")
    one, other = (PackedCheckpoint.open(path).weight(NAME) for path in (packed, tmp_path / "alone" / "packed"))
    assert torch.equal(one.qweight, other.qweight) and torch.equal(one.scales, other.scales)


def test_synthetic_models_have_it_too(tmp_path):
    from mpq_kernels.evaluate.synthetic import config_packable, synthetic_model

    tiny_model("llama", tmp_path, tied=True)
    plan = mpq.Plan.uniform(config_packable(tmp_path), bits=3, group_size=-1, embeddings=4)
    model = synthetic_model(tmp_path / "config.json", plan)
    assert isinstance(model.lm_head, TiedLinear) and logits(model).isfinite().all()


def test_the_packed_bytes_of_older_plans_stay(tmp_path):
    """A regex that matches everything means the linears, as it did."""
    tiny_model("llama", tmp_path / "m", tied=True)
    plan = mpq.Plan.from_dict({"version": 1, "modules": {"re:.*": {"bits": 4, "group_size": -1}}})
    mpq.pack(tmp_path / "m", tmp_path / "out", plan, quantizer="rtn")
    held = PackedCheckpoint.open(tmp_path / "out")
    assert f"{NAME}.weight" in held.tensors and "lm_head" in held.modules and NAME not in held.modules
    assert not any("embedding" in item for item in held.config["quantization_config"]["modules"].values())


@pytest.mark.parametrize("names", [("lm_head.weight",), (f"{NAME}.weight", "lm_head.weight")])
def test_a_tied_weight_under_other_names_in_the_files(names, tmp_path):
    """Stored as the head's alone, or twice: what is packed is stored once."""
    tiny_model("llama", tmp_path / "source", tied=True)
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    weight = tensors.pop(f"{NAME}.weight")
    save_file(tensors | {name: weight.clone() for name in names}, file, {"format": "pt"})
    plan = mpq.Plan.uniform(tmp_path / "source", bits=4, group_size=-1, embeddings=4)
    mpq.pack(tmp_path / "source", tmp_path / "packed", plan, quantizer="rtn")
    held = PackedCheckpoint.open(tmp_path / "packed")
    assert not {f"{NAME}.weight", "lm_head.weight"} & set(held.tensors) and held.modules[NAME].shared == ("lm_head",)
    model = mpq.load(tmp_path / "packed")
    assert isinstance(model.lm_head, TiedLinear) and logits(model).isfinite().all()


def test_a_kept_head_needs_the_dense_weight(tmp_path):
    tiny_model("llama", tmp_path / "m", tied=True)
    rules = {NAME: {"bits": 4, "group_size": -1}, "lm_head": {"bits": 16}}
    with pytest.raises(PlanError, match=r"lm_head is kept .* shares its weight with model\.embed_tokens"):
        mpq.pack(tmp_path / "m", tmp_path / "out", mpq.Plan.from_dict({"version": 1, "modules": rules}))
    rules["lm_head"] = {"bits": 8, "group_size": -1}
    mpq.pack(tmp_path / "m", tmp_path / "out", mpq.Plan.from_dict({"version": 1, "modules": rules}), quantizer="rtn")
    model = mpq.load(tmp_path / "out")
    assert isinstance(model.lm_head, mpq.MixedLinear) and model.lm_head.layout.segments[0].bits == 8
    assert "model.embed_tokens.weight" not in PackedCheckpoint.open(tmp_path / "out").tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item: item.update(embedding={"shared": "lm_head"}), "not a list of modules"),
        (lambda item: item.update(embedding={"shared": ["model.layers.0.mlp.up_proj"]}), "and also the user of"),
        (lambda item: item.update(bias=True), "an embedding has no bias"),
        (lambda item: item.update(embedding={"shared": ["model.rotary_emb"]}), "no such embedding or linear"),
        (lambda item: item.pop("embedding"), "the model has a Embedding there"),
    ],
)
def test_a_damaged_config_is_refused(change, message, tmp_path):
    _, packed = pack(tmp_path, tied=True)
    config = json.loads((packed / "config.json").read_text())
    change(config["quantization_config"]["modules"][NAME])
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        mpq.load(packed)
