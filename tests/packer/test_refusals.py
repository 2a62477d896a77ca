"""Packing refuses bad input, bad places and small disks in words, and what was at the output stays as it was."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import mpq_kernels.packer.output
import mpq_kernels.packer.pack
from mpq_kernels.errors import CheckpointError, PlanError, QuantizeError
from mpq_kernels.packer import pack as pack_model
from mpq_kernels.packer.pack import pack
from mpq_kernels.plan.plan import Plan
from tests.made.checkpoints import tiny_model
from tests.made.packed import UNIFORM, check_packed, digests, mixed_plan


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "model"
    tiny_model("llama", path, tied=True)
    return path


def damage_weight(value):
    def damage(path):
        tensors = load_file(path / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return damage


def truncate(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])


def plan_of(**rules):
    return Plan.from_dict({"version": 1, "default": {"bits": 4, "group_size": -1}, **rules})


def nothing(path):
    pass


UP = "model.layers.1.mlp.up_proj"
# name -> (damage to the source, plan, other arguments, error type, parts of the message)
BAD_INPUT = {
    "NaN": (damage_weight(float("nan")), UNIFORM, {}, QuantizeError, ["model.safetensors", UP, "NaN"]),
    "Inf": (damage_weight(float("-inf")), UNIFORM, {}, QuantizeError, ["model.safetensors", UP, "nf"]),
    "truncated": (truncate, UNIFORM, {}, CheckpointError, ["model.safetensors", "truncated"]),
    "group": (
        nothing,
        plan_of(modules={r"re:.*\.up_proj": {"bits": 4, "group_size": 48}}),
        {},
        PlanError,
        ["up_proj", "64", "group_size=48"],
    ),
    "plan for another model": (
        nothing,
        plan_of(modules={"model.layers.7.mlp.up_proj": {"bits": 3}}),
        {},
        PlanError,
        ["model.layers.7.mlp.up_proj"],
    ),
    "quantizer": (nothing, UNIFORM, {"quantizer": "magic"}, QuantizeError, ["'magic'", "rtn"]),
    "calibration": (nothing, UNIFORM, {"calibration": "text"}, QuantizeError, ["uses no calibration"]),
    "calibration missing": (
        nothing,
        UNIFORM,
        {"quantizer": "gptq"},
        QuantizeError,
        ["'gptq'", "it is missing", "text"],
    ),
    "calibration type": (
        nothing,
        UNIFORM,
        {"quantizer": "gptq", "calibration": "text"},
        QuantizeError,
        ["it is a str", "Path"],
    ),
    "shard bytes": (nothing, UNIFORM, {"max_shard_bytes": 0}, CheckpointError, ["max_shard_bytes=0"]),
    "no model": (shutil.rmtree, UNIFORM, {}, CheckpointError, ["is not a directory"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_leaves_the_output_alone(case, llama, tmp_path):
    damage, plan, arguments, kind, parts = BAD_INPUT[case]
    path = shutil.copytree(llama, tmp_path / "model")
    pack(path, tmp_path / "out", UNIFORM, quantizer="rtn")
    before = digests(tmp_path / "out")
    damage(path)
    with pytest.raises(kind) as caught:
        pack(path, tmp_path / "out", plan, **({"quantizer": "rtn", "overwrite": True} | arguments))
    for part in parts:
        assert part in str(caught.value)
    assert digests(tmp_path / "out") == before
    left = {name for name in os.listdir(tmp_path) if name.startswith(".")}
    assert set(os.listdir(tmp_path)) - left <= {"out", "model"}
    # What came before a weight that cannot be quantized is finished and stays; everything else is refused before.
    kept = f".out.partial-{os.getpid()}"
    assert left == ({kept, f"{kept}.journal"} if case in ("NaN", "Inf") else set())


def make_file(path):
    (path / "out").write_text("")


def make_foreign(path):
    (path / "out").mkdir()
    (path / "out" / "thesis.txt").write_text("")


# name -> (what is at the output first, output relative to the parent, overwrite, part of the message)
BAD_OUTPUT = {
    "not empty": (make_foreign, "out", False, "is not empty"),
    "foreign": (make_foreign, "out", True, "replaces packed checkpoints only"),
    "model itself": (nothing, "model", True, "overlaps the model directory"),
    "in the model": (nothing, "model/out", False, "overlaps the model directory"),
    "around the model": (nothing, ".", True, "overlaps the model directory"),
    "a file": (make_file, "out", True, "is a file"),
    "a link": (lambda p: (p / "out").symlink_to(p / "model"), "out", True, "is a symbolic link"),
    "no parent": (nothing, "a/b/out", False, "make it first"),
}


@pytest.mark.parametrize("case", BAD_OUTPUT)
def test_bad_outputs_are_refused(case, llama, tmp_path):
    prepare, out, overwrite, message = BAD_OUTPUT[case]
    path = shutil.copytree(llama, tmp_path / "model")
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        pack(path, tmp_path / out, UNIFORM, quantizer="rtn", overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_read_only_parent(llama, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere, so a mode would not do
    with pytest.raises(CheckpointError, match="cannot write .*out.*Permission denied"):
        pack(llama, tmp_path / "out", UNIFORM, quantizer="rtn")


def test_empty_directory_is_used(llama, tmp_path):
    (tmp_path / "out").mkdir()
    pack(llama, tmp_path / "out", UNIFORM, quantizer="rtn")
    check_packed(llama, tmp_path / "out", UNIFORM)
    assert os.listdir(tmp_path) == ["out"]


def test_disk_space_is_checked_first(llama, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(mpq_kernels.packer.output.shutil, "disk_usage", lambda path: usage(10**9, 0, 50_000))
    with pytest.raises(CheckpointError, match=r"\d+ bytes are needed and 50000 are free, \d+ too few"):
        pack(llama, tmp_path / "out", UNIFORM, quantizer="rtn")
    assert os.listdir(tmp_path) == []


def test_space_asked_for_is_what_is_written(llama, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pack_model, "check_space", lambda parent, needed, files: asked.append((needed, files)))
    pack(llama, tmp_path / "out", mixed_plan(llama), quantizer="rtn", max_shard_bytes=50_000)
    sizes = [file.stat().st_size for file in (tmp_path / "out").iterdir()]
    assert asked == [(sum(sizes), len(sizes))]


def test_a_source_that_is_removed_once_it_was_opened(llama, tmp_path, monkeypatch):
    """The campaign of faults found a FileNotFoundError here."""
    model = shutil.copytree(llama, tmp_path / "model")
    checked = mpq_kernels.packer.pack.check_loads
    monkeypatch.setattr(
        mpq_kernels.packer.pack, "check_loads",
        lambda *args: (checked(*args), (model / "model.safetensors").unlink())[0],
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read .*removed"):
        pack(model, tmp_path / "out", UNIFORM, quantizer="rtn")
    assert not (tmp_path / "out").exists()
