"""Whole models: the packed one has the very weights of the dense one that the source means, and its logits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import mpq_kernels as mpq
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.errors import CheckpointError
from mpq_kernels.format.reference import dequantize
from mpq_kernels.packer.pack import pack
from tests.made.checkpoints import tiny_model
from tests.made.foreign_checkpoints import (
    awq_checkpoint,
    compressed_checkpoint,
    gguf_checkpoint,
    gptq_checkpoint,
    mlx_checkpoint,
)
from tests.made.packed import digests
from tests.made.quantized_sources import mxfp4_checkpoint
from tests.made.resumed import Killed

IDS = torch.arange(3, 15)[None]
MOE = {"size": 16, "sizes": {"moe_intermediate_size": 64}}


def mixed(name):
    """Widths by layer and linear, as GPTQModel's `dynamic` and auto-round's `extra_config` give them."""
    return 8 if "down_proj" in name else 2 if "layers.1" in name else 3 if "v_proj" in name else 4


def by_input(name):
    """One order of the columns for linears that read the same input."""
    return sum(name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_", "gate_").encode())


# case -> (maker, family, its words)
CASES = {
    "gptq": (gptq_checkpoint, "llama", {"symmetric": True}),
    "gptq v1": (gptq_checkpoint, "llama", {"version": "gptq"}),
    "mixed widths": (gptq_checkpoint, "llama", {"bits": mixed, "files": 3}),
    "act-order": (gptq_checkpoint, "llama", {"order": by_input, "bits": mixed}),
    "groups that do not divide K": (gptq_checkpoint, "llama", {"size": 128}),
    "a tied head": (gptq_checkpoint, "llama", {"tied": True}),
    "biases": (awq_checkpoint, "qwen2", {}),
    "fused in the source": (awq_checkpoint, "phi3", {"sizes": {}}),
    "bfloat16": (awq_checkpoint, "llama", {"dtype": torch.bfloat16}),
    "compressed-tensors": (compressed_checkpoint, "llama", {"bits": mixed}),
    "compressed-tensors of experts": (compressed_checkpoint, "mixtral", {"files": 2}),
    "stored transposed": (gptq_checkpoint, "gpt2", {}),
    "mlx": (mlx_checkpoint, "llama", {}),
    "mlx, a tied head": (mlx_checkpoint, "qwen2", {"tied": True}),
    "gguf": (gguf_checkpoint, "llama", {}),
    "gguf of qwen2": (gguf_checkpoint, "qwen2", {"tied": True}),
    "mixtral": (gptq_checkpoint, "mixtral", {"bits": lambda name: 8 if "experts.1" in name else 4}),
    "qwen3_moe": (gptq_checkpoint, "qwen3_moe", MOE | {"symmetric": True}),
    "deepseek_v3": (awq_checkpoint, "deepseek_v3", MOE),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_and_logits(case, tmp_path):
    maker, family, words = CASES[case]
    source, out = tmp_path / "source", tmp_path / "out"
    twin = maker(source, family, **words)
    report = mpq.import_checkpoint(source, out)
    held = PackedCheckpoint.open(out)
    held.verify_values()
    named = {f"{member}.weight" for module in report.packed.modules for member in module.members}
    assert named == set(twin) - set(held.kept_tensors()) - {name for name in twin if name.endswith(".bias")}
    for name, module in held.modules.items():
        weight, row = dequantize(held.weight(name)), 0
        for member in module.replaced():
            wanted = twin[f"{member}.weight"]
            wanted = wanted.T if family == "gpt2" else wanted
            assert torch.equal(weight[row : row + len(wanted)].to(wanted.dtype), wanted), member
            row += len(wanted)
        assert row == len(weight)
    for name in held.kept_tensors():
        assert torch.equal(held.read(name), twin[name])
    with torch.no_grad():
        got = mpq.load(out)(IDS).logits.float()
        wanted = AutoModelForCausalLM.from_pretrained(f"{source}-dense", dtype="auto").eval()(IDS).logits.float()
    near = 2**-6 if words.get("dtype") else 2**-18  # a rounding of bf16 in each layer; sums of fp32 in another order
    assert (got - wanted).norm() < near * wanted.norm()


def test_the_report(tmp_path):
    gptq_checkpoint(tmp_path / "source", bits=mixed, order=by_input)
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    report = mpq.import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert report.format == "gptq" and report.packed.kept == {"lm_head": "not quantized in the source"}
    said = "gptq v2, 3 bits, groups of 32, reordered columns, zero points"
    assert report.taken["model.layers.0.self_attn.v_proj"] == said
    assert report.packed.copied == ("chat_template.jinja", "generation_config.json")
    assert report.packed.left == {"quantize_config.json": "says how the source was quantized"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quantizer"]) == ("mpq", "imported from gptq")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["taken"]["model.layers.0.self_attn.v_proj"] == said and "errors" not in data["modules"][0]


def test_mxfp4(tmp_path):
    """Every expert is that of transformers; gate and up are every other row of one tensor."""
    mxfp4_checkpoint(tmp_path / "source")
    report = mpq.import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert report.taken["model.layers.0.mlp.experts.1.up_proj"] == "mxfp4, 5 bits, groups of 32"
    stored, held = load_file(tmp_path / "source" / "model.safetensors"), PackedCheckpoint.open(tmp_path / "out")
    for name in held.modules:
        base = f"{name}_proj"
        wanted = convert_moe_packed_tensors(stored[f"{base}_blocks"], stored[f"{base}_scales"]).transpose(1, 2)
        if name.endswith("gate_up"):
            wanted = torch.cat([wanted[:, 0::2], wanted[:, 1::2]], dim=1)
        assert torch.equal(dequantize(held.weight(name)).bfloat16().view(wanted.shape), wanted)
    assert len(held.modules) == 4 and report.packed.decoded == ()
    assert torch.isfinite(mpq.load(tmp_path / "out")(IDS).logits).all()


@pytest.mark.parametrize("kept", [False, True])
def test_load_imports_first_and_says_so(kept, tmp_path):
    gptq_checkpoint(tmp_path / "source")
    where = {"import_to": tmp_path / "out"} if kept else {}
    with pytest.warns(UserWarning, match=r"source is a gptq checkpoint; it is imported into (a temporary|/).* before"):
        model = mpq.load(tmp_path / "source", **where)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "source-dense").eval()
    with torch.no_grad():
        got, wanted = model(IDS).logits, wanted(IDS).logits
    assert (got - wanted).norm() < 2**-18 * wanted.norm()
    assert (tmp_path / "out").exists() == kept
    if kept:
        mpq.load(tmp_path / "out")
        with pytest.raises(CheckpointError, match="there is nothing to import in it"):
            mpq.load(tmp_path / "out", import_to=tmp_path / "again")


def test_fused(tmp_path):
    """The very weights, in fewer modules; where the order of the columns differs, not."""
    twin = gptq_checkpoint(tmp_path / "source", bits=mixed)
    report = mpq.import_checkpoint(tmp_path / "source", tmp_path / "out", fuse=True)
    held = PackedCheckpoint.open(tmp_path / "out")
    assert len(held.modules) == 8 and len(report.taken) == 14 and report.notes == ()
    name = "model.layers.0.self_attn.qkv_proj"
    wanted = [twin[f"{name.replace('qkv', part)}.weight"] for part in "qkv"]
    assert torch.equal(dequantize(held.weight(name)), torch.cat(wanted))
    with torch.no_grad():
        got = mpq.load(tmp_path / "out")(IDS).logits
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "source-dense").eval()(IDS).logits
    assert (got - wanted).norm() < 2**-18 * wanted.norm()
    gptq_checkpoint(tmp_path / "ordered", order=lambda name: sum(name.encode()))
    report = mpq.import_checkpoint(tmp_path / "ordered", tmp_path / "apart", fuse=True)
    assert len(PackedCheckpoint.open(tmp_path / "apart").modules) == 14
    assert [note.split(":")[0] for note in report.notes] == ["not fused into qkv_proj", "not fused into gate_up_proj"]


@pytest.mark.usefixtures("commit_at_once")
def test_ended_and_gone_on_with(tmp_path):
    """The bytes of a run that was not ended; a change of the source in between is refused."""
    source, out = tmp_path / "source", tmp_path / "out"
    gptq_checkpoint(source, "mixtral", files=3)
    mpq.import_checkpoint(source, tmp_path / "wanted", max_shard_bytes=40_000)
    left = 7

    def progress(done, total, name):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    with pytest.raises(Killed):
        mpq.import_checkpoint(source, out, max_shard_bytes=40_000, progress=progress)
    with pytest.raises(CheckpointError, match="parts are finished and kept by a run that was killed"):
        mpq.import_checkpoint(source, out, max_shard_bytes=40_000)
    report = mpq.import_checkpoint(source, out, max_shard_bytes=40_000, resume=True)
    assert report.packed.resumed == 6 and digests(out) == digests(tmp_path / "wanted")


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_zeros_are_believed_and_not_the_label(label, tmp_path):
    """Symmetric weights of one version under the label of the other."""
    other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[label]
    twin = gptq_checkpoint(tmp_path / "source", symmetric=True, version=other, label=label)
    report = mpq.import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert any("the zeros of 14 symmetric weights are" in text for text in report.notes)
    held = PackedCheckpoint.open(tmp_path / "out")
    assert all(torch.equal(dequantize(held.weight(name)), twin[f"{name}.weight"]) for name in held.modules)
    assert all(module.layout.zero_dtype is None for module in held.modules.values())


def test_packed_and_dense_models_are_no_sources(tmp_path):
    tiny_model("llama", tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed", mpq.Plan.uniform(tmp_path / "dense", 4, -1), quantizer="rtn")
    with pytest.raises(CheckpointError, match="it is packed already"):
        mpq.import_checkpoint(tmp_path / "packed", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"is none of gptq, .*has no quantization_config.*--from"):
        mpq.import_checkpoint(tmp_path / "dense", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no file holds a qweight; nothing is quantized in the form of"):
        mpq.import_checkpoint(tmp_path / "dense", tmp_path / "out", format="gptq")
