"""The packed reader distrusts config.json and every file; what it accepts is mapped as it lies on disk."""

import copy
import json
import shutil
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mpq_kernels.checkpoint.config import PackedModule, PackingConfig
from mpq_kernels.checkpoint.packed import PackedCheckpoint, validate_tensors
from mpq_kernels.errors import CheckpointError
from mpq_kernels.files.strict import read_json_object
from mpq_kernels.format.layout import Member, Segment, SizeBreakdown, WeightLayout
from mpq_kernels.packer.pack import pack
from tests.made.checkpoints import tiny_model
from tests.made.packed import mixed_plan

DOWN = "model.layers.1.mlp.down_proj"  # permuted, two column segments
QKV = "model.layers.0.self_attn.qkv_proj"  # fused, with a bias
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A packed Qwen2 in one file; tests copy it before they damage it."""
    path = tmp_path_factory.mktemp("packed")
    tiny_model("qwen2", path / "model", tied=False)
    pack(path / "model", path / "out", mixed_plan(path / "model"), quantizer="rtn")
    return path / "out"


@pytest.fixture(scope="module")
def config(whole):
    return read_json_object(whole / "config.json")["quantization_config"]


def edit_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path, change):
    data = json.loads((path / "config.json").read_text())
    change(data["quantization_config"])
    (path / "config.json").write_text(json.dumps(data))


def test_weights_are_mapped(whole):
    packed = PackedCheckpoint.open(whole)
    for name in packed.modules:
        first, second = packed.weight(name), packed.weight(name)
        for key, tensor in first.tensors().items():
            assert tensor.data_ptr() == second.tensors()[key].data_ptr()
            assert tensor.data_ptr() % 64 == 0  # the map starts on a page, and the file is aligned
    assert packed.modules[QKV].members == (Member("q_proj", 0, 64), Member("k_proj", 64, 96), Member("v_proj", 96, 128))
    assert packed.modules[QKV].replaced() == [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    assert packed.bias(QKV).shape == (128,) and packed.bias(UP) is None
    assert packed.modules[UP].members is None and packed.modules[UP].replaced() == [UP]


def test_sizes_come_from_the_tensors(whole):
    packed = PackedCheckpoint.open(whole)
    size = packed.size()
    tensors = load_file(whole / "model.safetensors")
    held = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    kept = sum(held[name] for name in packed.kept_tensors())
    bias = sum(held[f"{name}.bias"] for name, module in packed.modules.items() if module.bias)
    assert (size.kept, size.bias) == (kept, bias) and bias == 2 * 128 * 4
    assert size.packed.total_bytes == sum(held.values()) - kept - bias
    assert size.files == (whole / "model.safetensors").stat().st_size
    assert size.packed == sum((m.layout.size() for m in packed.modules.values()), SizeBreakdown())


def test_from_a_config_and_files(whole, config):
    packed = PackedCheckpoint.from_config(config, [str(whole / "model.safetensors")])
    assert packed.packing == PackedCheckpoint.open(whole).packing
    assert torch.equal(packed.weight(UP).qweight, PackedCheckpoint.open(whole).weight(UP).qweight)
    assert set(validate_tensors(packed.modules, [whole / "model.safetensors"]).tensors) == set(packed.tensors)
    with pytest.raises(CheckpointError, match="none was given"):
        validate_tensors(packed.modules, [])


def test_files_written_by_another_writer_are_read(whole, tmp_path):
    """save_pretrained aligns to 8 bytes and sorts in its own way; the values are the same."""
    path = shutil.copytree(whole, tmp_path / "copy")
    edit_tensors(path, lambda t: None)
    before, after = PackedCheckpoint.open(whole), PackedCheckpoint.open(path)
    after.verify_values()
    for name in before.tensors:
        assert torch.equal(before.read(name), after.read(name))


def test_config_round_trips(config):
    parsed = PackingConfig.from_dict(config)
    assert parsed.to_dict() == config
    assert json.dumps(parsed.to_dict()) == json.dumps(config)  # the order too
    assert len(config["layouts"]) < len(config["modules"])  # shared ones are written once
    assert parsed.modules["model.layers.0.mlp.up_proj"].layout is parsed.modules["model.layers.1.mlp.up_proj"].layout


def shard_in_half(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def misalign(path):
    """A legal file whose int32 data begin at an odd byte: a tensor of one byte goes before all."""
    data = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + 1 for offset in entry["data_offsets"]]
    header["odd"] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" + data[8 + length :])


def tensors(change):
    return lambda path: edit_tensors(path, change)


def setting(**changes):
    return lambda path: edit_config(path, lambda c: c.update(changes))


# name -> (damage, parts of the message)
BROKEN = {
    "truncated": (shard_in_half, ["model.safetensors", "truncated"]),
    "missing qweight": (tensors(lambda t: t.pop(f"{UP}.qweight")), [f"{UP}.qweight", "is missing"]),
    "missing perm": (tensors(lambda t: t.pop(f"{DOWN}.perm")), [f"{DOWN}.perm", "is missing"]),
    "missing bias": (tensors(lambda t: t.pop(f"{QKV}.bias")), [f"{QKV}.bias", "is missing"]),
    "short qweight": (
        tensors(lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:-128]})),
        ["model.safetensors", f"{UP}.qweight", "I32 [640]", "asks for int32 [768]"],
    ),
    "2-d scales": (
        tensors(lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].view(2, -1)})),
        [f"{UP}.scales", "F16 [2, 128]", "float16 [256]"],
    ),
    "scale dtype": (
        tensors(lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].float()})),
        [f"{UP}.scales", "F32", "asks for float16"],
    ),
    "bias dtype": (
        tensors(lambda t: t.update({f"{QKV}.bias": t[f"{QKV}.bias"].long()})),
        [f"{QKV}.bias", "I64", "float32 or float16 or bfloat16"],
    ),
    "extra zeros": (
        tensors(lambda t: t.update({"lm_head.zeros": torch.zeros(192, dtype=torch.uint8)})),
        ["lm_head.zeros", "has no place for it"],
    ),
    "extra qweight": (
        tensors(lambda t: t.update({"other.qweight": torch.zeros(2, dtype=torch.int32)})),
        ["other.qweight", "has no place for it"],
    ),
    "dense weight beside": (
        tensors(lambda t: t.update({f"{UP}.weight": torch.ones(128, 64)})),
        [f"{UP}.weight", "has no place for it"],
    ),
    "dense member beside": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(64, 64)})),
        ["q_proj.weight", "has no place for it"],
    ),
    "misaligned": (misalign, ["not a multiple of its 4-byte elements", "save_pretrained"]),
    "dense": (
        lambda p: (p / "config.json").write_text('{"model_type": "qwen2"}'),
        ["config.json", "has no quantization_config", "pack it first"],
    ),
    "another method": (setting(quant_method="gptq"), ["quant_method='gptq' is not 'mpq'"]),
    "newer version": (setting(format_version=3), ["format_version=3", "this build reads 2", "update"]),
    "older version": (setting(format_version=1), ["an older version", "again: mpq pack SOURCE OUT --plan PLAN"]),
    "version a text": (setting(format_version="2"), ["format_version='2'"]),
    "version true": (setting(format_version=True), ["format_version=True"]),
    "another layout": (
        setting(layout_id="mpq1-0"),
        ["layout_id='mpq1-0'", "pack the model again: mpq pack SOURCE OUT"],
    ),
    "producer a text": (setting(producer="mpq_kernels 0.1.0"), ["producer='mpq_kernels 0.1.0' is not a name and"]),
    "producer of more": (setting(producer={"name": "m", "version": "1", "x": "y"}), ["is not a name and a version"]),
    "producer of numbers": (setting(producer={"name": "m", "version": 1}), ["is not a name and a version"]),
    "unknown key": (setting(surprise=1), ["unknown keys", "surprise"]),
    "missing key": (lambda p: edit_config(p, lambda c: c.pop("kept")), ["missing keys ['kept']"]),
    "absurd layers": (
        lambda p: (p / "config.json").write_text(
            json.dumps(json.loads((p / "config.json").read_text()) | {"num_hidden_layers": 10**8})
        ),
        ["num_hidden_layers=100000000"],
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ["neither model.safetensors"]),
    "weights linked out": (
        lambda p: (
            shutil.move(p / "model.safetensors", p.parent / "w.safetensors"),
            (p / "model.safetensors").symlink_to(p.parent / "w.safetensors"),
        ),
        ["outside the directory"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directories_are_refused_in_words(case, whole, tmp_path):
    damage, parts = BROKEN[case]
    path = shutil.copytree(whole, tmp_path / "copy")
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        PackedCheckpoint.open(path)
    for part in [*parts, str(path)]:
        assert part in str(caught.value)


def poke(name, value):
    def change(held):
        held[name] = held[name].clone()
        held[name].view(-1)[1] = value

    return tensors(change)


BROKEN_VALUES = {
    "NaN scale": (poke(f"{UP}.scales", float("nan")), [UP, "scales hold NaN or Inf"]),
    "Inf scale": (poke("lm_head.scales", float("inf")), ["lm_head", "scales hold NaN or Inf"]),
    "repeat in perm": (
        tensors(lambda t: t[f"{DOWN}.perm"].__setitem__(0, t[f"{DOWN}.perm"][1].item())),
        [DOWN, "not a permutation of 0..127"],
    ),
    "perm out of range": (poke(f"{DOWN}.perm", 128), [DOWN, "not a permutation"]),
    "NaN bias": (poke(f"{QKV}.bias", float("nan")), [f"{QKV}.bias", "NaN or Inf"]),
}


@pytest.mark.parametrize("case", BROKEN_VALUES)
def test_broken_values_are_found_by_verify(case, whole, tmp_path):
    damage, parts = BROKEN_VALUES[case]
    path = shutil.copytree(whole, tmp_path / "copy")
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        PackedCheckpoint.open(path).verify_values()
    for part in [*parts, "model.safetensors"]:
        assert part in str(caught.value)


def test_names_that_are_not_packed_modules(whole):
    packed = PackedCheckpoint.open(whole)
    for call in (packed.weight, packed.bias):
        with pytest.raises(CheckpointError, match="'model.norm' is not a packed module"):
            call("model.norm")
    with pytest.raises(CheckpointError, match="is not a directory"):
        PackedCheckpoint.open(whole / "config.json")


def module_of(**changes):
    return lambda c: c["modules"][QKV].update(changes)


def layout_of(**changes):
    return lambda c: c["layouts"][0].update(changes)


MEMBERS = [["q_proj", 0, 64], ["k_proj", 64, 96], ["v_proj", 96, 128]]
HOSTILE = {
    "layouts": (lambda c: c.update(layouts={}), "layouts must be a list"),
    "modules": (lambda c: c.update(modules=[]), "modules an object"),
    "kept": (lambda c: c.update(kept={"a": 1}), "kept must map"),
    "quantizer": (lambda c: c.update(quantizer=None), "quantizer=None is not a string"),
    "layout index": (module_of(layout=99), "layout=99 is not one of"),
    "negative index": (module_of(layout=-1), "layout=-1 is not one of"),
    "index true": (module_of(layout=True), "layout=True is not one of"),
    "bias": (module_of(bias=1), "bias=1 is not true or false"),
    "module keys": (module_of(extra=0), "expected the keys layout, bias and members"),
    "module a list": (lambda c: c["modules"].update({UP: []}), "expected the keys layout"),
    "no members": (module_of(members=[]), "members must be null or a list"),
    "member a text": (module_of(members=["q_proj"]), r"is not \[name, n0, n1\]"),
    "member gap": (module_of(members=[MEMBERS[0], MEMBERS[2]]), "rows 96..128 where rows from 64 are due"),
    "member overlap": (module_of(members=[MEMBERS[0], ["k_proj", 32, 96], MEMBERS[2]]), "rows from 64 are due"),
    "member backwards": (module_of(members=[["q_proj", 0, 0], *MEMBERS]), "rows 0..0"),
    "member inside": (module_of(members=[["q_proj", 0, 60], ["k_proj", 60, 96], MEMBERS[2]]), "inside a segment"),
    "members short": (module_of(members=MEMBERS[:2]), "members cover 96 of 128 rows"),
    "member twice": (module_of(members=[["q_proj", 0, 64], ["q_proj", 64, 96], MEMBERS[2]]), "is a member and also"),
    "member path": (module_of(members=[["../q", 0, 64], *MEMBERS[1:]]), "is not a module name"),
    "member float": (module_of(members=[["q_proj", 0, 64.0], *MEMBERS[1:]]), r"is not \[name, n0, n1\]"),
    "member is packed": (lambda c: c["modules"].update({"model.layers.0.self_attn.q_proj": c["modules"][UP]}), "also"),
    "kept is packed": (lambda c: c["kept"].update({UP: "?"}), "is packed and also kept"),
    "module name": (lambda c: c["modules"].update({"a..b": c["modules"][UP]}), "is not a module name"),
    "module newline": (lambda c: c["modules"].update({"a\nb": c["modules"][UP]}), "is not a module name"),
    "long name": (lambda c: c["modules"].update({"a" * 10**5: c["modules"][UP]}), "is not a module name"),
    "layout keys": (layout_of(extra=1), "layout 0: a layout has the keys"),
    "layout a number": (lambda c: c.update(layouts=[3, *c["layouts"][1:]]), "layout 0: a layout must be an object"),
    "rows": (layout_of(out_features=0), "is not a positive integer"),
    "huge rows": (layout_of(out_features=10**18), "an integer is over"),
    "scale dtype": (layout_of(scale_dtype=["float16"]), "scale_dtype="),
    "segment bits": (layout_of(segments=[[0, 128, 0, 64, 9, 32, "int"]]), "bits=9"),
    "segment group": (layout_of(segments=[[0, 128, 0, 64, 3, 48, "int"]]), "group_size=48"),
    "segment short": (layout_of(segments=[[0, 64, 0, 64, 3, 32, "int"]]), "cover 64 of 128 rows"),
    "segment list": (layout_of(segments=[[0, 128]]), "segments must be a list"),
    "segment zero": (layout_of(segments=[[0, 128, 0, 64, 3, 32, {}]]), "zero="),
    "nested": (layout_of(segments=[[[0], 128, 0, 64, 3, 32, "int"]]), "is not an integer"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_configs_are_refused_in_words(case, config):
    damage, message = HOSTILE[case]
    damaged = copy.deepcopy(config)
    damage(damaged)
    with pytest.raises(CheckpointError, match=message) as caught:
        PackingConfig.from_dict(damaged, "where")
    assert str(caught.value).startswith("where: ") and len(str(caught.value)) < 1000


@pytest.mark.parametrize("data", [None, [], "mpq", 3])
def test_configs_that_are_no_objects(data):
    with pytest.raises(CheckpointError, match="must be an object"):
        PackingConfig.from_dict(data)


def test_sizes_in_a_config_allocate_nothing(config, whole):
    """A layout of 2 TB is as cheap to refuse as a small one: the file does not hold it."""
    damaged = copy.deepcopy(config)
    side = 2**21
    damaged["layouts"].append(WeightLayout.uniform(side, side, 4).to_dict())
    damaged["modules"][UP]["layout"] = len(damaged["layouts"]) - 1
    with pytest.raises(CheckpointError, match=r"asks for int32 \[549755813888\]"):
        PackedCheckpoint.from_config(damaged, [whole / "model.safetensors"])


def test_many_modules_of_a_long_layout_take_linear_time(config):
    """20,000 modules that share a layout of 20,000 segments: 400 million steps if each module went through them."""
    segments = tuple(Segment(n, n + 1, 0, 64, 4, 64, "int") for n in range(20_000))
    layout = WeightLayout(20_000, 64, segments)
    modules = {f"m.{i}": {"layout": 0, "bias": False, "members": None} for i in range(20_000)}
    data = config | {"layouts": [layout.to_dict()], "modules": modules, "kept": {}}
    start = time.process_time()
    parsed = PackingConfig.from_dict(data)
    assert len(parsed.modules) == 20_000
    assert time.process_time() - start < 5  # half a second here; the product would take minutes


def test_a_module_without_a_parent():
    module = PackedModule("qkv", WeightLayout.uniform(64, 64, 4), False, (Member("q", 0, 64),))
    assert module.parent == "" and module.replaced() == ["q"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """Paths of every value inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_fuzz_configs(config, whole, data):
    """Any value of a good config replaced by any other: accepted whole or refused with CheckpointError."""
    damaged = copy.deepcopy(config)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from([path for path in places(damaged) if path]))
        target = damaged
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = data.draw(JSON | st.integers(-2, 130))
    try:
        PackedCheckpoint.from_config(damaged, [whole / "model.safetensors"])
    except CheckpointError as error:
        assert len(str(error)) < 2000
