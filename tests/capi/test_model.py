"""The C reader of packed directories finds what the package finds, and refuses in words."""

import ctypes
import json
import shutil
from ctypes import byref, c_void_p, create_string_buffer

import pytest
import torch
from safetensors.torch import load_file, save_file

import mpq_kernels as mpq
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.files.safetensors import NAMES
from tests.made import c_library as c
from tests.made.checkpoints import tiny_model
from tests.made.mixtures import expert_plan
from tests.made.packed import mixed_plan

MESSAGE_BYTES = 512


class Model:
    """An opened mpq_model. Raises ValueError with its message."""

    def __init__(self, path, version=c.VERSION):
        self.handle, message = c_void_p(), create_string_buffer(b"\xff" * (MESSAGE_BYTES - 1), MESSAGE_BYTES)
        status = c.LIBRARY.mpq_model_open(version, str(path).encode(), byref(self.handle), message, MESSAGE_BYTES)
        if status:
            assert not self.handle
            raise ValueError(f"{status}: {message.value.decode()}")
        assert message.value == b""

    def modules(self):
        count = c.LIBRARY.mpq_model_count(self.handle)
        assert not c.LIBRARY.mpq_model_module(self.handle, count) and not c.LIBRARY.mpq_model_module(self.handle, -1)
        return [c.LIBRARY.mpq_model_module(self.handle, i).contents for i in range(count)]

    def close(self):
        c.LIBRARY.mpq_model_close(self.handle)


def pack(tmp_path, family, plan, tied=None, **words):
    tiny_model(family, tmp_path / "model", tied=tied)
    mpq.pack(tmp_path / "model", tmp_path / "out", plan(tmp_path / "model"), quantizer="rtn", **words)
    return tmp_path / "out"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("c"), "qwen2", mixed_plan, tied=False)


@pytest.fixture
def copy(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    return tmp_path / "copy"


def memory(address, count):
    return ctypes.string_at(address, count) if count else b""


def raw(tensor):
    return b"" if tensor is None else bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def check_same(path):
    """Every module, member, segment and byte."""
    checkpoint, model = PackedCheckpoint.open(path), Model(path)
    found = model.modules()
    assert [m.name.decode() for m in found] == list(checkpoint.modules)
    for got, (name, wanted) in zip(found, checkpoint.modules.items(), strict=True):
        layout, tensors, weight = wanted.layout, checkpoint.weight(name), got.weight
        assert (weight.out_features, weight.in_features) == (layout.out_features, layout.in_features)
        theirs = c.weight_of(tensors)
        assert weight.scale_dtype == theirs.scale_dtype
        fields = [field for field, _ in c.Segment._fields_]
        for i in range(len(layout.segments)):
            assert [getattr(weight.segments[i], f) for f in fields] == [getattr(theirs.segments[i], f) for f in fields]
        assert weight.num_segments == len(layout.segments)
        bias = checkpoint.bias(name)
        for key in ("qweight", "scales", "zeros", "perm"):
            assert memory(getattr(weight, key), getattr(got, f"{key}_bytes")) == raw(getattr(tensors, key))
        assert memory(got.bias, got.bias_bytes) == raw(bias)
        assert bias is None or got.bias_dtype == c.DTYPES[bias.dtype]
        members = [(m.name.decode(), m.n0, m.n1) for m in (got.members[i] for i in range(got.num_members))]
        assert members == [(m.name, m.n0, m.n1) for m in wanted.members or ()]
        assert got.num_experts == (wanted.experts.count if wanted.experts else 0)
        assert bool(got.embedding) == (wanted.embedding is not None)
        assert c.LIBRARY.mpq_model_find(model.handle, name.encode()).contents.weight.qweight == weight.qweight
    for name in checkpoint.kept_tensors():
        tensor, wanted = c.Tensor(), checkpoint.read(name)
        c.check(c.LIBRARY.mpq_model_tensor(model.handle, name.encode(), byref(tensor)))
        assert (tensor.dtype.decode(), tuple(tensor.shape[: tensor.rank])) == (NAMES[wanted.dtype], wanted.shape)
        assert memory(tensor.data, tensor.bytes) == raw(wanted)
    assert not c.LIBRARY.mpq_model_find(model.handle, b"nobody")
    assert c.LIBRARY.mpq_model_tensor(model.handle, b"nobody", byref(c.Tensor())) == 20
    model.close()


def test_widths_segments_biases_members(packed):
    check_same(packed)


def test_shards_and_experts(tmp_path):
    path = pack(tmp_path, "mixtral", expert_plan, max_shard_bytes=60_000)
    assert (path / "model.safetensors.index.json").exists()
    check_same(path)


def test_embeddings_and_float8(tmp_path):
    tiny_model("llama", tmp_path / "model", tied=True)
    plan = mpq.Plan.uniform(tmp_path / "model", bits=3, group_size=-1, embeddings=4).model_dump(mode="json")
    plan["modules"]["model.layers.1.mlp.down_proj"] = {"bits": 8, "dtype": "float8_e4m3fn"}
    mpq.pack(tmp_path / "model", tmp_path / "out", mpq.Plan.from_dict(plan), quantizer="rtn")
    check_same(tmp_path / "out")


def test_a_directory_of_links(packed, tmp_path):
    """As Hugging Face's cache has it: snapshots/<revision>/<name> -> blobs/<hash>."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    for index, file in enumerate(sorted(packed.iterdir())):
        shutil.copy(file, blobs / str(index))
        (snapshot / file.name).symlink_to(f"../../blobs/{index}")
    check_same(snapshot)


def edit(path, change):
    """Change quantization_config in place."""
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def first(config):
    return next(iter(config["modules"].values()))


CONFIGS = {
    "another layout": (lambda q: q.update(layout_id="mpq2-0"), "layout_id is mpq2-0"),
    "another version": (lambda q: q.update(format_version=99), "format_version"),
    "another method": (lambda q: q.update(quant_method="gptq"), "quant_method"),
    "no layouts": (lambda q: q.pop("layouts"), "layouts is missing"),
    "no such layout": (lambda q: first(q).update(layout=99), "no such layout"),
    "bias of a string": (lambda q: first(q).update(bias="no"), "bias is missing, or of another kind"),
    "9 bits": (lambda q: q["layouts"][0]["segments"][0].__setitem__(4, 9), "a segment does not fit"),
    "a huge weight": (lambda q: q["layouts"][0].update(out_features=2**40), "out_features is out of range"),
    "a gap": (lambda q: q["layouts"][0]["segments"].pop(), "segments"),
    "a kind of zeros": (lambda q: q["layouts"][0]["segments"][0].__setitem__(6, "both"), "both is unknown"),
    "fewer rows": (lambda q: q["layouts"][0].update(scale_dtype="float32"), "another dtype or shape"),
    "a module that is not stored": (lambda q: q["modules"].update(a=first(q)), "the tensor a.qweight is missing"),
    "a module too few": (lambda q: q["modules"].pop(next(iter(q["modules"]))), "no place for the tensor"),
    "members that do not tile": (lambda q: first(q).update(members=[["a", 0, 1]]), "members do not cover"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_configs_that_are_refused(copy, what):
    change, text = CONFIGS[what]
    edit(copy, change)
    with pytest.raises(ValueError, match=f"^19: .*{text}"):
        Model(copy)


FILES = {
    "no config": ("config.json", None, "18: .*no such file"),
    "a config that is no JSON": ("config.json", b'{"a": }', "19: .*not valid JSON .*at byte 6"),
    "a name twice": ("config.json", b'{"a": 1, "a": 2}', "a name appears twice"),
    "nested": ("config.json", b"[" * 10_000, "nested too deeply"),
    "half a pair": ("config.json", rb'{"a": "\ud800x"}', "half a surrogate pair"),
    "a list": ("config.json", b"[]", "holds no JSON object"),
    "a dense model": ("config.json", b"{}", "quantization_config is missing"),
    "no tensors": ("model.safetensors", None, "no such file"),
    "an empty file": ("model.safetensors", b"", "truncated"),
    "a length": ("model.safetensors", b"\xff" * 16, "truncated"),
    "a header that is no JSON": ("model.safetensors", b"\x02" + bytes(7) + b"{]", "not valid JSON"),
}


@pytest.mark.parametrize("what", FILES)
def test_files_that_are_refused(copy, what):
    name, data, text = FILES[what]
    (copy / name).unlink()
    if data is not None:
        (copy / name).write_bytes(data)
    with pytest.raises(ValueError, match=text):
        Model(copy)


@pytest.mark.parametrize("cut", [1, 1000])
def test_truncated_and_long_files(copy, cut):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-cut])
    with pytest.raises(ValueError, match="truncated"):
        Model(copy)
    (copy / "model.safetensors").write_bytes(data + bytes(cut))
    with pytest.raises(ValueError, match="bytes that belong to no tensor"):
        Model(copy)


def rewrite_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def names(header):
    return [name for name in header if name.endswith(".qweight")]


HEADERS = {
    "a dtype": (lambda h: h[names(h)[0]].update(dtype="I33"), "unknown dtype I33"),
    "a shape": (lambda h: h[names(h)[0]].update(shape=[2**62, 4]), "out of range"),
    "fewer bytes": (lambda h: h[names(h)[0]].update(shape=[1]), "does not take the bytes"),
    "a negative size": (lambda h: h[names(h)[0]].update(shape=[-1]), "no dtype, shape"),
    "offsets": (lambda h: h[names(h)[0]].update(data_offsets=[0]), "not \\[begin, end\\]"),
    "overlap": (lambda h: h.__setitem__(names(h)[0], h[names(h)[1]]), "overlap, or leave a gap"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_are_refused(copy, what):
    change, text = HEADERS[what]
    rewrite_header(copy / "model.safetensors", change)
    with pytest.raises(ValueError, match=text):
        Model(copy)


def test_tensors_of_nobody_are_refused(copy):
    """A second pack's rest; guards of shape [0], which save_pretrained writes, are none."""
    tensors = load_file(copy / "model.safetensors")
    module = next(iter(PackedCheckpoint.open(copy).modules))
    save_file(tensors | {f"{module}.weight": torch.empty(0)}, copy / "model.safetensors")
    Model(copy).close()
    save_file(tensors | {f"{module}.weight": torch.zeros(4)}, copy / "model.safetensors")
    with pytest.raises(ValueError, match="no place for the tensor"):
        Model(copy)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_that_leads_elsewhere(copy, name):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="not a plain name|not a .safetensors file"):
        Model(copy)


def test_a_link_out_of_the_directory(copy, tmp_path):
    (copy / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (copy / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="outside of the directory"):
        Model(copy)


def test_a_message_is_cut_and_a_version_compared(packed):
    handle, message = c_void_p(), create_string_buffer(b"\xff" * 8, 8)
    assert c.LIBRARY.mpq_model_open(c.VERSION, b"/nowhere", byref(handle), message, 8) == 18
    assert len(message.value) == 7
    assert c.LIBRARY.mpq_model_open(c.VERSION, b"/nowhere", byref(handle), None, 0) == 18
    with pytest.raises(ValueError, match="12: .*another version"):
        Model(packed, version=c.VERSION + 1)
