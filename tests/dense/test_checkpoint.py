"""A dense checkpoint is matched with its model tensor by tensor, and every unsafe or broken one is refused by name."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.errors import CheckpointError
from tests.made.checkpoints import FAMILIES, VOCAB, tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(directory of an untied Llama in one file, its model); tests copy it before they damage it."""
    path = tmp_path_factory.mktemp("llama") / "model"
    return path, tiny_model("llama", path, tied=False)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded") / "model"
    tiny_model("qwen3", path, tied=True, max_shard_size=60_000)
    return path


def copy_of(path, tmp_path):
    return shutil.copytree(path, tmp_path / "copy")


def edit_json(path, **changes):
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def edit_tensors(path, change):
    """Apply `change` to the dict of tensors of model.safetensors."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_found_with_its_tensor(family, tied, tmp_path):
    model = tiny_model(family, tmp_path, tied=tied, max_shard_size=60_000 if tied else "1GB")
    source = DenseCheckpoint.open(tmp_path)
    specs = source.linears()
    modules = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert [spec.name for spec in specs] == list(modules)
    for spec in specs:
        module = modules[spec.name]
        assert (spec.out_features, spec.in_features) == (module.out_features, module.in_features)
        assert torch.equal(source.read(spec.tensor), module.weight)
        assert (spec.bias_tensor is None) == (module.bias is None)
        if spec.bias_tensor is not None:
            assert torch.equal(source.read(spec.bias_tensor), module.bias)
        assert (spec.is_head, spec.tied) == (spec.name == "lm_head", spec.name == "lm_head" and tied)
    assert source.dtype == torch.float32
    assert source.other_files() == ["generation_config.json"] and not source.left_files()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_comes_from_the_config(dtype, tmp_path):
    tiny_model("llama", tmp_path, dtype=dtype)
    assert DenseCheckpoint.open(tmp_path).dtype == dtype
    edit_json(tmp_path / "config.json", dtype=None)  # then from the tensors
    assert DenseCheckpoint.open(tmp_path).dtype == dtype


def test_tensors_are_mapped(llama):
    source = DenseCheckpoint.open(llama[0])
    first, second = (source.read("model.embed_tokens.weight") for _ in range(2))
    assert first.data_ptr() == second.data_ptr()


def test_tied_head_stored_as_head_only(tmp_path):
    """Some checkpoints (TinyStories-656K) hold a tied pair as lm_head.weight and no embedding."""
    model = tiny_model("llama", tmp_path, tied=True)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    source = DenseCheckpoint.open(tmp_path)
    head = source.linears()[-1]
    assert (head.name, head.tensor, head.is_head, head.tied) == ("lm_head", "lm_head.weight", True, True)
    assert torch.equal(source.read(head.tensor), model.lm_head.weight)
    assert (source.model_map.tied_source, source.model_map.tied_target) == (
        "lm_head.weight",
        "model.embed_tokens.weight",
    )


def test_tied_pair_stored_twice(tmp_path):
    tiny_model("llama", tmp_path, tied=True)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    source = DenseCheckpoint.open(tmp_path)
    assert source.linears()[-1].tensor == "lm_head.weight"
    assert source.model_map.tied_source == source.model_map.tied_target == "model.embed_tokens.weight"


def test_base_model_prefix_may_be_missing(tmp_path):
    """Checkpoints saved from the base model have no "model." in front; transformers maps them, and so does this."""
    model = tiny_model("llama", tmp_path, tied=True)
    edit_tensors(tmp_path, lambda t: [t.update({name.removeprefix("model."): t.pop(name)}) for name in list(t)])
    source = DenseCheckpoint.open(tmp_path)
    spec = source.linears()[0]
    assert (spec.name, spec.tensor) == ("model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj.weight")
    assert torch.equal(source.read(spec.tensor), model.model.layers[0].self_attn.q_proj.weight)
    assert source.model_map.tied_target == "embed_tokens.weight"


def test_buffers_and_strangers_do_not_matter(llama, tmp_path):
    path = copy_of(llama[0], tmp_path)
    edit_tensors(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert len(DenseCheckpoint.open(path).linears()) == 15


def truncate(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def to_pickle(path):
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(load_file(path / "model.safetensors")))
    (path / "model.safetensors").unlink()


UP = "model.layers.1.mlp.up_proj.weight"
# damage(path) -> parts of the message
BROKEN = {
    "truncated shard": (truncate, ["model.safetensors", "truncated"]),
    "pickle only": (to_pickle, ["pytorch_model.bin", "pickles can run code", "save_pretrained"]),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ["neither model.safetensors nor"]),
    "missing linear": (lambda p: edit_tensors(p, lambda t: t.pop(UP)), [UP, "no file holds"]),
    "missing norm": (
        lambda p: edit_tensors(p, lambda t: t.pop("model.norm.weight")),
        ["model.norm.weight", "1 missing"],
    ),
    "missing head": (lambda p: edit_tensors(p, lambda t: t.pop("lm_head.weight")), ["lm_head.weight", "no file holds"]),
    "wrong shape": (
        lambda p: edit_tensors(p, lambda t: t.update({UP: torch.ones(170, 64)})),
        ["model.safetensors", UP, "[170, 64]", "[172, 64]"],
    ),
    "wrong norm shape": (
        lambda p: edit_tensors(p, lambda t: t.update({"model.norm.weight": torch.ones(65)})),
        ["model.norm.weight", "[65]", "[64]"],
    ),
    "wrong dtype": (
        lambda p: edit_tensors(p, lambda t: t.update({UP: t[UP].to(torch.int8)})),
        ["model.safetensors", UP, "I8", "must be fp32, fp16 or bf16"],
    ),
    "fp8 dtype": (
        lambda p: edit_tensors(p, lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})),
        [UP, "F8_E4M3", "must be fp32, fp16 or bf16"],
    ),
    "no config": (lambda p: (p / "config.json").unlink(), ["config.json", "no such file"]),
    "config not JSON": (lambda p: (p / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
    "config a list": (lambda p: (p / "config.json").write_text("[]"), ["config.json", "JSON list"]),
    "config repeats": (lambda p: (p / "config.json").write_text('{"a":1,"a":2}'), ["config.json", "'a' appears twice"]),
    "quantized": (
        lambda p: edit_json(p / "config.json", quantization_config={"quant_method": "gptq"}),
        ["already quantized with 'gptq'", "dequantize it first"],
    ),
    "text part quantized": (
        lambda p: edit_json(p / "config.json", text_config={"quantization_config": {"quant_method": "awq"}}),
        ["already quantized with 'awq'"],
    ),
    "unknown type": (lambda p: edit_json(p / "config.json", model_type="nobody"), ["config.json", "nobody"]),
    "remote code": (
        lambda p: edit_json(p / "config.json", model_type="x", auto_map={"AutoConfig": "evil.Evil"}),
        ["config.json", "is not run"],
    ),
    "not causal": (lambda p: edit_json(p / "config.json", model_type="vit"), ["config.json", "cannot build"]),
    "absurd layers": (
        lambda p: edit_json(p / "config.json", num_hidden_layers=10**9),
        ["num_hidden_layers=1000000000"],
    ),
    "absurd sizes": (lambda p: edit_json(p / "config.json", vocab_size=2**62, hidden_size=2**40), ["config.json"]),
    "wrong types": (lambda p: edit_json(p / "config.json", hidden_size="many"), ["config.json"]),
    "dtype": (lambda p: edit_json(p / "config.json", dtype="int8"), ["dtype='int8'"]),
    "own weights name": (
        lambda p: edit_json(p / "config.json", transformers_weights="../x.safetensors"),
        ["transformers_weights"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused_in_words(case, llama, tmp_path):
    damage, parts = BROKEN[case]
    path = copy_of(llama[0], tmp_path)
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        DenseCheckpoint.open(path).linears()
    for part in [*parts, str(path)]:
        assert part in str(caught.value)


def test_code_in_a_checkpoint_is_not_run(llama, tmp_path):
    path = copy_of(llama[0], tmp_path)
    ran = tmp_path / "ran"
    (path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    edit_json(
        path / "config.json", model_type="x", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    )
    with pytest.raises(CheckpointError):
        DenseCheckpoint.open(path).linears()
    assert not ran.exists()


def edit_index(path, change):
    file = path / "model.safetensors.index.json"
    data = json.loads(file.read_text())
    change(data["weight_map"])
    file.write_text(json.dumps(data))


def point_to(name):
    return lambda p: edit_index(p, lambda m: m.update({"model.norm.weight": name}))


def link_out(path):
    shard = sorted(path.glob("model-*.safetensors"))[0]
    shutil.move(shard, path.parent / "outside.safetensors")
    shard.symlink_to(path.parent / "outside.safetensors")


def pipe_shard(path):
    shard = sorted(path.glob("model-*.safetensors"))[0]
    shard.unlink()
    os.mkfifo(shard)


def repeat_tensor(path):
    """The first tensor of one shard also in another."""
    first, second = sorted(path.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file(load_file(second) | {name: tensors[name]}, second)


BROKEN_INDEX = {
    "parent": (point_to("../model.safetensors"), ["'../model.safetensors' is not a plain name"]),
    "absolute": (point_to("/etc/x.safetensors"), ["is not a plain name"]),
    "folder": (point_to("a/x.safetensors"), ["is not a plain name"]),
    "backslash": (point_to("..\\x.safetensors"), ["is not a plain name"]),
    "NUL": (point_to("x\0.safetensors"), ["is not a plain name"]),
    "dots": (point_to(".."), ["not a .safetensors file"]),
    "pickle": (point_to("pytorch_model.bin"), ["'pytorch_model.bin' is not a .safetensors file"]),
    "number": (point_to(3), ["weight_map must map"]),
    "no such file": (point_to("model-9.safetensors"), ["'model-9.safetensors'", "no such file"]),
    "empty": (lambda p: edit_index(p, dict.clear), ["weight_map must map"]),
    "link out": (link_out, ["outside.safetensors", "outside the directory"]),
    "pipe": (pipe_shard, ["not a regular file"]),
    "ghost": (
        lambda p: edit_index(p, lambda m: m.update({"ghost": m["model.norm.weight"]})),
        ["index.json", "'ghost'", "no file holds it"],
    ),
    "wrong shard": (
        lambda p: edit_index(p, lambda m: m.update({"model.norm.weight": m["model.embed_tokens.weight"]})),
        ["'model.norm.weight' should be in"],
    ),
    "twice": (repeat_tensor, ["is also in"]),
}


@pytest.mark.parametrize("case", BROKEN_INDEX)
def test_broken_indexes_are_refused_in_words(case, sharded, tmp_path):
    damage, parts = BROKEN_INDEX[case]
    path = copy_of(sharded, tmp_path)
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        DenseCheckpoint.open(path)
    for part in [*parts, str(path)]:
        assert part in str(caught.value)


def hub_cache(sharded, tmp_path):
    """The sharded checkpoint in the layout of Hugging Face's cache: every file a link into blobs."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, file in enumerate(sorted(sharded.iterdir())):
        shutil.copy(file, blobs / f"{index:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{index:040x}")
    return snapshot


def test_hub_cache_links_are_followed(sharded, tmp_path):
    source = DenseCheckpoint.open(hub_cache(sharded, tmp_path))
    assert len(source.linears()) == 15
    assert source.read("model.embed_tokens.weight").shape == (VOCAB, 64)
    assert source.other_files() == ["generation_config.json"]


def test_hub_cache_links_may_not_leave_it(sharded, tmp_path):
    snapshot = hub_cache(sharded, tmp_path)
    shard = sorted(snapshot.glob("model-*.safetensors"))[0]
    target = shutil.copy(shard, tmp_path / "outside")
    shard.unlink()
    shard.symlink_to(target)
    with pytest.raises(CheckpointError, match="outside the directory"):
        DenseCheckpoint.open(snapshot)


@pytest.mark.parametrize("name", ["none", "config.json"])
def test_not_a_directory(name, llama):
    with pytest.raises(CheckpointError, match="is not a directory"):
        DenseCheckpoint.open(llama[0] / name)


def test_unknown_tensor(llama):
    with pytest.raises(CheckpointError, match="there is no tensor 'nothing'"):
        DenseCheckpoint.open(llama[0]).read("nothing")


def test_file_that_changed_after_it_was_checked(llama, tmp_path):
    path = copy_of(llama[0], tmp_path)
    source = DenseCheckpoint.open(path)
    edit_tensors(path, lambda t: t.update({UP: torch.ones(170, 64)}))
    with pytest.raises(CheckpointError, match="the file has changed"):
        source.read(UP)
