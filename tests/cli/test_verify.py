"""`mpq verify`: hashes, values, the error of every layer against the original, and bounded memory."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mpq_kernels
from mpq_kernels import Plan
from mpq_kernels.checkpoint.manifest import MANIFEST_FILE, read_manifest
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.cli.verify import _compare
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.errors import CheckpointError
from mpq_kernels.format.reference import dequantize, weight_error
from tests.made.checkpoints import tiny_model
from tests.made.commands import HEAD, Runner, broken_copy

EXAMPLE = Path(__file__).parents[2] / "examples" / "gutenberg-6m"


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", "gpt_oss"])
def packed(request, tmp_path_factory):
    """(dense directory, packed directory of two shards)."""
    root = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, root / "dense", tied=False, dtype=torch.bfloat16, max_shard_size="100KB")
    plan = Plan.from_dict({"version": 1, "default": {"bits": 3, "group_size": -1}})
    half = sum(file.stat().st_size for file in (root / "dense").glob("*.safetensors")) // 5
    mpq_kernels.pack(root / "dense", root / "out", plan, "rtn", max_shard_bytes=half)
    return root / "dense", root / "out"


def test_manifest_has_the_digests_of_the_files(packed):
    out = packed[1]
    found = json.loads((out / MANIFEST_FILE).read_text())
    shards = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(shards) > 1 and sorted(found["files"]) == sorted(
        [*shards, "config.json", "model.safetensors.index.json"]
    )
    for name, entry in found["files"].items():
        data = (out / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_errors_are_those_of_the_tensors(packed, capsys):
    """Relative and largest error of every linear, experts as well, computed here in fp64."""
    dense, out = packed
    data = Runner(capsys)("verify", out, "--against", dense, "--json").json()
    assert data["ok"] is True and sorted(data["hashed"]) == sorted(read_manifest(out))
    source, checkpoint = DenseCheckpoint.open(dense), PackedCheckpoint.open(out)
    layers = {layer["name"]: layer for layer in data["layers"]}
    specs = {spec.name: spec for spec in source.linears()}
    assert set(layers) == set(specs)
    for name, module in checkpoint.modules.items():
        held, row = dequantize(checkpoint.weight(name)).double(), 0
        for member in module.replaced():
            wanted = source.weight(specs[member]).double()
            # The command subtracts in fp32: one rounding of each difference, at most 2**-24 of the larger weight.
            off, slack = held[row : row + len(wanted)] - wanted, 2.0**-23 * wanted.abs().max().item()
            assert layers[member]["packed"] == name and layers[member]["bits"] == "3"
            assert layers[member]["max_error"] == pytest.approx(off.abs().max().item(), abs=slack) and off.any()
            assert layers[member]["relative_error"] == pytest.approx((off.norm() / wanted.norm()).item(), rel=1e-6)
            row += len(wanted)


def test_text(packed, capsys):
    dense, out = packed
    text = Runner(capsys)("verify", out, "--against", dense).out
    assert "max error" in text and ": good." in text and "SHA-256 as in mpq_manifest.json: config.json" in text


def flip_code(out):
    path = sorted(out.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1
    path.write_bytes(data)


def drop_from_manifest(out):
    data = json.loads((out / MANIFEST_FILE).read_text())
    del data["files"]["config.json"]
    (out / MANIFEST_FILE).write_text(json.dumps(data))


def edit_manifest(key, value):
    def edit(out):
        data = json.loads((out / MANIFEST_FILE).read_text())
        data[key] = value
        (out / MANIFEST_FILE).write_text(json.dumps(data))

    return edit


def add_space(out):
    (out / "config.json").write_text((out / "config.json").read_text() + " ")


FAULTS = {
    "a code": (flip_code, ["safetensors: sha256 ", "not as it was"]),
    "config": (add_space, ["config.json: bytes "]),
    "index": (lambda out: (out / "model.safetensors.index.json").write_text("{}"), ["model.safetensors.index.json"]),
    "not listed": (drop_from_manifest, ["config.json: is not in mpq_manifest.json"]),
    "version": (edit_manifest("manifest_version", 2), ["manifest_version=2"]),
    "files": (edit_manifest("files", []), ["files must map names"]),
    "outside": (edit_manifest("files", {"../x": {}}), ["is not in mpq_manifest.json"]),
    "no entry": (edit_manifest("files", {"x": 3}), ["files must map names"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_end_with_1_and_one_message(case, packed, tmp_path, capsys):
    damage, words = FAULTS[case]
    out = shutil.copytree(packed[1], tmp_path / "out")
    damage(out)
    refused = Runner(capsys)("verify", out, "--json", code=1)
    assert refused.out == "" and len(refused.err.splitlines()) == 1
    for word in words:
        assert word in refused.err


def test_names_in_a_manifest_stay_in_the_directory(packed, tmp_path, capsys):
    out = shutil.copytree(packed[1], tmp_path / "out")
    data = json.loads((out / MANIFEST_FILE).read_text())
    data["files"]["../secret"] = {"bytes": 1, "sha256": ""}
    (out / MANIFEST_FILE).write_text(json.dumps(data))
    assert "is not a plain name" in Runner(capsys)("verify", out, code=1).err


def test_without_a_manifest_that_is_said(packed, tmp_path, capsys):
    out = shutil.copytree(packed[1], tmp_path / "out")
    (out / MANIFEST_FILE).unlink()
    assert Runner(capsys)("verify", out, "--json").json()["hashed"] is None
    assert "not hashed" in Runner(capsys)("verify", out).out


def test_a_model_that_is_none_is_wrong_usage(packed, capsys):
    assert "is not a directory" in Runner(capsys)("verify", packed[1], "--against", "nowhere", code=1).err
    Runner(capsys)("verify", code=2)


def test_error_of_a_weight_in_several_chunks(monkeypatch):
    """The same whatever is dequantized at once, with segments and a permutation; zeros have no error."""
    from mpq_kernels.format.layout import Segment, WeightLayout
    from mpq_kernels.quantize import quantize_weight

    segments = (
        Segment(0, 30, 0, 64, 4, 32, "int"), Segment(0, 30, 64, 128, 2, 64, "int"),
        Segment(30, 50, 0, 128, 3, 128, "none"),
    )  # fmt: skip
    layout = WeightLayout(50, 128, segments, "float16", True)
    weight, perm = torch.randn(50, 128), torch.randperm(128, dtype=torch.int32)
    quantized = quantize_weight(weight, layout, perm, "rtn")
    off = dequantize(quantized).double() - weight.double()
    for chunk in (128, 1000, 2**18):
        monkeypatch.setattr("mpq_kernels.format.reference.CHUNK_WEIGHTS", chunk)
        error = weight_error(weight, quantized)
        assert error.relative == pytest.approx((off.norm() / weight.double().norm()).item(), rel=1e-6)
        assert error.largest == pytest.approx(off.abs().max().item(), rel=1e-5)
    zeros = quantize_weight(torch.zeros(50, 128), layout, perm, "rtn")
    assert weight_error(torch.zeros(50, 128), zeros).relative == 0.0
    assert weight_error(torch.zeros(50, 128), quantized).relative == float("inf")


def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is Linux's count")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """80 MB of weights in four shards, of which neither packing nor verifying holds more than a few at a time.

    Each may take a shard, two times the largest tensor and, for its temporaries, 30 MB; measured from what the process
    holds before.
    """
    sizes = {
        "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 8, "vocab_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    dense, out = tmp_path / "dense", tmp_path / "out"
    tiny_model("llama", dense, dtype=torch.bfloat16, max_shard_size="20MB", sizes=sizes)
    files = sorted(dense.glob("*.safetensors"))
    assert len(files) >= 4 and sum(file.stat().st_size for file in files) > 79e6
    plan = Plan.uniform(dense, 8, 64)
    mpq_kernels.pack(EXAMPLE, tmp_path / "warm", Plan.uniform(EXAMPLE, 8), "rtn")  # what only the first call takes
    _compare(PackedCheckpoint.open(tmp_path / "warm"), EXAMPLE, True)
    room = max(file.stat().st_size for file in files) + 2 * 640 * 1728 * 2 + 30e6

    def peak(work):
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
        work()
        return resident("VmHWM") - before

    assert peak(lambda: mpq_kernels.pack(dense, out, plan, "rtn")) < room
    assert peak(lambda: _compare(PackedCheckpoint.open(out), dense, True)) < room
    kept = []

    def keep_all():
        kept.extend(tensor for file in files for tensor in load_file(file).values())
        assert sum(tensor.float().sum() for tensor in kept).isfinite()

    held = peak(keep_all)
    assert held > 70e6, "the count of memory does not count"


def test_released_tensors_are_read_again(tmp_path):
    tiny_model("llama", tmp_path / "m")
    source = DenseCheckpoint.open(tmp_path / "m")
    name = "model.layers.0.mlp.up_proj.weight"
    tensor, wanted = source.read(name), load_file(tmp_path / "m" / "model.safetensors")[name]
    source.release(name)
    assert torch.equal(tensor, wanted) and torch.equal(source.read(name), wanted)
    with pytest.raises(CheckpointError, match="there is no tensor"):
        source.read("none")


def test_verify_measures_the_error_of_every_layer(run):
    data = run("verify", "mixed", "--against", "dense", "--json").json()
    assert data["ok"] is True
    dense = load_file("dense/model.safetensors")
    errors = {layer["name"]: layer for layer in data["layers"]}
    assert len(errors) == 14
    checkpoint = PackedCheckpoint.open("mixed")
    qkv = dequantize(checkpoint.weight("model.layers.0.self_attn.qkv_proj"))
    for name, rows in (("q_proj", qkv[:128]), ("k_proj", qkv[128:192]), ("v_proj", qkv[192:])):
        wanted = dense[f"model.layers.0.self_attn.{name}.weight"].double()
        layer = errors[f"model.layers.0.self_attn.{name}"]
        assert layer["relative_error"] == pytest.approx(((rows - wanted).norm() / wanted.norm()).item(), rel=1e-6)
    assert errors["model.layers.0.self_attn.v_proj"]["bits"] == "5"
    assert errors["model.layers.0.mlp.down_proj"]["bits"] == "8|2"
    text = run("verify", "mixed", "--against", "dense").out
    assert "model.layers.1.self_attn.v_proj" in text
    assert ": good." in text
    assert run("verify", "packed", "--json").json()["layers"] is None


def test_verify_refuses_bad_values(run, tmp_path, space):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.scales"][7] = float("nan")

    refused = run("verify", broken_copy(space, tmp_path, "packed", change), code=1)
    assert "model.layers.1.mlp.up_proj" in refused.err
    assert "NaN" in refused.err


def test_verify_refuses_another_model(run, tmp_path, space):
    def change(tensors):
        tensors["model.norm.weight"][0] += 1

    kept = run("verify", broken_copy(space, tmp_path, "packed", change), "--against", "dense", code=1)
    assert "model.norm.weight" in kept.err
    tiny_model("llama", tmp_path / "other", tied=False, sizes=HEAD | {"num_hidden_layers": 1})
    assert "another model" in run("verify", "packed", "--against", tmp_path / "other", code=1).err


@pytest.mark.parametrize("command", [["inspect"], ["verify"]])
def test_dense_and_missing_directories_are_refused(run, command):
    assert "dense" in run(*command, "dense", code=1).err
    assert "nowhere" in run(*command, "nowhere", code=1).err
