"""transformers: packed directories load, generate, save and reload; what is wrong with one is an error."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mpq_kernels as mpq
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.nn.fused import FusedLinear
from mpq_kernels.nn.linear import packed_modules
from tests.made.checkpoints import FAMILIES, tiny_model
from tests.made.mixtures import generate
from tests.made.twins import dequantized_twin

FUSIBLE = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3")


def plan_for(path, family, lm_head=16) -> mpq.Plan:
    """Widths 1..8 in turn, groups of 32 and of all columns, fused where the model has separate projections."""
    specs = DenseCheckpoint.open(path).linears()
    modules = {}
    for index, spec in enumerate(specs):
        group = 32 if spec.in_features % 32 == 0 else -1
        bits = lm_head if spec.is_head else 8 - index % 7
        modules[spec.name] = {"bits": bits, "group_size": group, "symmetric": index % 3 == 0}
    fuse = []
    if family in FUSIBLE:
        fuse = [
            {"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]},
            {"name": "gate_up_proj", "members": ["gate_proj", "up_proj"]},
        ]
    return mpq.Plan.model_validate({"version": 1, "modules": modules, "fuse": fuse})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_the_dequantized_model(family, tied, tmp_path):
    source, out = tmp_path / "source", tmp_path / "packed"
    tiny_model(family, source, tied=tied, max_shard_size="60KB")
    mpq.pack(source, out, plan_for(source, family, lm_head=8 if tied else 5), quantizer="rtn", max_shard_bytes=60_000)
    model = mpq.load(out)
    assert isinstance(model.lm_head, mpq.MixedLinear)
    assert any(isinstance(m, FusedLinear) for _, m in packed_modules(model)) == (family in FUSIBLE)
    packed, dense = generate(model), generate(dequantized_twin(model, source))
    assert torch.equal(packed.sequences, dense.sequences)
    for a, b in zip(packed.scores, dense.scores, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()  # fp32 sums in another order: tens of roundings of 2**-24


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory):
    """A packed tied Qwen2 with biases, fused groups and a packed head."""
    root = tmp_path_factory.mktemp("packed")
    tiny_model("qwen2", root / "source", tied=True)
    mpq.pack(root / "source", root / "out", plan_for(root / "source", "qwen2", lm_head=4), quantizer="rtn")
    return root / "out"


@pytest.fixture
def copied(packed_dir, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(packed_dir, tmp_path / "copy")
    return tmp_path / "copy"


def test_plain_from_pretrained_and_save_pretrained_round_trip(packed_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_dir)
    loaded = mpq.load(packed_dir)
    assert torch.equal(generate(model).sequences, generate(loaded).sequences)
    model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    for reloaded in (mpq.load(tmp_path / "again"), AutoModelForCausalLM.from_pretrained(tmp_path / "again")):
        state, before = reloaded.state_dict(), model.state_dict()
        assert state.keys() == before.keys()
        for name, tensor in before.items():
            assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    old = json.loads((packed_dir / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == old


def test_tensors_of_the_file_are_those_of_the_model(packed_dir):
    stored, state = load_file(packed_dir / "model.safetensors"), mpq.load(packed_dir).state_dict()
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_model_dtype_leaves_packed_tensors_alone(packed_dir, dtype):
    stored = load_file(packed_dir / "model.safetensors")
    for model in (mpq.load(packed_dir, dtype=dtype), AutoModelForCausalLM.from_pretrained(packed_dir, dtype=dtype)):
        layer = model.model.layers[0].self_attn.qkv_proj
        assert torch.equal(layer.scales, stored["model.layers.0.self_attn.qkv_proj.scales"])
        assert layer.bias.dtype == layer.weight.dtype == dtype
        assert torch.isfinite(generate(model, 3).scores[0]).all()
    model.to(torch.float32)
    assert torch.equal(layer.scales, stored["model.layers.0.self_attn.qkv_proj.scales"])


def test_deepcopy_of_a_loaded_model(packed_dir):
    model = mpq.load(packed_dir)
    assert torch.equal(generate(copy.deepcopy(model)).sequences, generate(model).sequences)


def test_the_reference_backend_can_be_asked_for(packed_dir):
    model = mpq.load(packed_dir, backend="reference")
    assert {module.backend for _, module in packed_modules(model)} == {"reference"}
    assert torch.equal(generate(model).sequences, generate(mpq.load(packed_dir)).sequences)
    with pytest.raises(mpq.UnsupportedError, match="there is no backend 'exllama'"):
        mpq.load(packed_dir, backend="exllama")


def test_compiled_model_gives_the_same_logits(packed_dir):
    model = mpq.load(packed_dir)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(lambda i: model(i, use_cache=False).logits, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids), expected, rtol=1e-5, atol=1e-5)


def loaders():
    return {"load": mpq.load, "from_pretrained": AutoModelForCausalLM.from_pretrained}


def rewrite(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors", {"format": "pt"})


QKV = "model.layers.0.self_attn.qkv_proj"


@pytest.mark.parametrize("loader", loaders())
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{QKV}.qweight"), f"{QKV}.qweight' is missing"),
        (lambda t: t.pop(f"{QKV}.bias"), f"{QKV}.bias' is missing"),
        (lambda t: t.update({f"{QKV}.qweight": t[f"{QKV}.qweight"][:-1]}), "asks for int32"),
        (lambda t: t.update({f"{QKV}.scales": t[f"{QKV}.scales"].float()}), "asks for float16"),
        (lambda t: t.update({f"{QKV}.zeros": t[f"{QKV}.zeros"].to(torch.int32)}), "asks for uint8"),
        (lambda t: t.update({f"{QKV}.perm": torch.arange(64, dtype=torch.int32)}), "has no place for it"),
    ],
)
def test_a_wrong_packed_tensor_is_an_error(copied, loader, change, words):
    rewrite(copied, change)
    with pytest.raises(mpq.CheckpointError, match=words):
        loaders()[loader](copied)


@pytest.mark.parametrize("loader", loaders())
def test_bad_values_are_an_error(copied, loader):
    rewrite(copied, lambda t: t[f"{QKV}.scales"].fill_(float("nan")))
    with pytest.raises(mpq.MPQError, match="scales hold NaN"):
        loaders()[loader](copied)


def test_a_missing_kept_tensor_is_an_error_of_load(copied):
    rewrite(copied, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(mpq.CheckpointError, match=r"model\.norm\.weight"):
        mpq.load(copied)


@pytest.mark.parametrize("loader", loaders())
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("format_version", 3, "format_version=3"),
        ("layout_id", "mpq1-0000000000000000", "layout_id"),
        ("layouts", [], "is not one of the 0 layouts"),
    ],
)
def test_unknown_versions_are_refused(copied, loader, key, value, words):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"][key] = value
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(mpq.CheckpointError, match=words):
        loaders()[loader](copied)


@pytest.mark.parametrize("loader", loaders())
@pytest.mark.parametrize(
    ("change", "words"), [({"hidden_size": 128}, "the model wants"), ({"num_hidden_layers": 1}, "has no such module")]
)
def test_a_config_of_another_model_is_refused(copied, loader, change, words):
    config = json.loads((copied / "config.json").read_text())
    if "layer_types" in config and "num_hidden_layers" in change:
        config["layer_types"] = config["layer_types"][:1]
    (copied / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(mpq.CheckpointError, match=words):
        loaders()[loader](copied)


def test_packing_while_loading_is_refused(tmp_path):
    tiny_model("llama", tmp_path / "m")
    from mpq_kernels.hf.quantizer import MPQConfig

    with pytest.raises((mpq.UnsupportedError, ValueError), match=r"pre-quantized|mpq_kernels\.pack"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=MPQConfig())


def test_import_registers_once_and_again():
    from mpq_kernels.hf import quantizer

    quantizer.register()
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert AUTO_QUANTIZER_MAPPING["mpq"] is quantizer.MPQQuantizer
