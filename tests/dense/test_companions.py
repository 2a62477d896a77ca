"""Everything beside the weights is carried along, but for what a list leaves out, each with its reason."""

import os
import pickle
import shutil

import pytest

from mpq_kernels.dense import companions as rules
from mpq_kernels.dense.companions import companions

CARRIED = (
    "LICENSE.md",
    "README.md",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "notes.of_a_kind_that_nobody_knows",
    "preprocessor_config.json",
    "tokenizer.model",
    "1_Pooling/config.json",
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "assets/figures/logo.png",
)
# name -> part of the reason
LEFT = {
    ".gitattributes": "hidden",
    "adapter_config.json": "adapter",
    "consolidated.00.pth": "pickle",
    "model.gguf": "another format",
    "model.onnx_data": "another format",
    "model.safetensors.index.json": "index of weights",
    "modeling_own.py": "code",
    "mpq_manifest.json": "another packing",
    "optimizer.pt": "pickle",
    "other.SAFETENSORS": "does not use",
    "pytorch_model.bin.index.json": "index of weights",
    "tf_model.h5": "another format",
    "training_args.bin": "pickle",
    "__pycache__/": "cache",
    ".cache/": "hidden",
    "assets/figures/tool.py": "code",
    "onnx/model.onnx": "another format",
}


@pytest.fixture
def model(tmp_path):
    """A directory with every file of the two lists, and one that is used."""
    root = tmp_path / "model"
    for name in (*CARRIED, *LEFT, "config.json"):
        path = root / name / "inside.json" if name.endswith("/") else root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return root


def test_all_is_carried_but_for_the_list(model):
    found = companions(model, {"config.json"})
    assert [name for name, why in found.items() if why is None] == sorted(CARRIED, key=lambda name: ("/" in name, name))
    left = {name: why for name, why in found.items() if why is not None}
    assert set(left) == set(LEFT)
    for name, words in LEFT.items():
        assert words in left[name], name


def link(target):
    return lambda path: path.symlink_to(target)


def link_out(path):
    path.symlink_to(next(folder for folder in path.parents if (folder / "secret.json").exists()) / "secret.json")


# name -> (how it is made, whether a folder, part of the reason)
ODD = {
    "link out of the directory": (link_out, False, "outside the directory"),
    "link to nothing": (link("nowhere"), False, "not a regular file"),
    "link to a folder": (link("figures"), True, "a link to a folder"),
    "link to the parent": (link(".."), True, "a link to a folder"),
    "pipe": (os.mkfifo, False, "not a regular file"),
    "pickle of another name": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), False, "pickle"),
    "large": (lambda path: path.write_bytes(b"0" * 101), False, "101 bytes, over the limit of 100"),
}


@pytest.mark.parametrize("folder", ["", "assets/"])
@pytest.mark.parametrize("case", ODD)
def test_odd_files_are_left(case, folder, model, tmp_path, monkeypatch):
    make, is_folder, words = ODD[case]
    monkeypatch.setattr(rules, "MAX_FILE_BYTES", 100)
    (tmp_path / "secret.json").write_text("{}")
    (model / "figures").mkdir()
    make(model / folder / "odd")
    assert words in companions(model, set())[f"{folder}odd" + ("/" if is_folder else "")]


def test_folders_of_many_files_are_left_whole(model, monkeypatch):
    monkeypatch.setattr(rules, "MAX_FOLDER_FILES", 3)
    for index in range(4):
        (model / "assets" / f"{index}.txt").write_text("")
    found = {name: why for name, why in companions(model, set()).items() if name.startswith("assets")}
    assert found == {"assets/": "holds more than 3 files"}


def test_folders_that_are_too_deep_are_left(model):
    inner = ["assets", *map(str, range(rules.MAX_DEPTH))]
    model.joinpath(*inner).mkdir(parents=True)
    for depth in (rules.MAX_DEPTH, rules.MAX_DEPTH + 1):
        model.joinpath(*inner[:depth], "far.txt").write_text("")
    found = companions(model, set())
    assert found["/".join([*inner[:-1], "far.txt"])] is None
    assert "folders deep" in found["/".join(inner) + "/"]


def test_a_link_inside_the_directory_is_a_file(model):
    (model / "assets" / "again.json").symlink_to("../preprocessor_config.json")
    assert companions(model, set())["assets/again.json"] is None


def test_folders_share_a_limit_and_are_left_whole(model, monkeypatch):
    monkeypatch.setattr(rules, "MAX_FOLDER_BYTES", 5)
    found = companions(model, set())
    assert found["1_Pooling/config.json"] is None
    assert "4 bytes, over the 3 that are left" in found["additional_chat_templates/"]
    assert found["assets/figures/logo.png"] is None
    assert "additional_chat_templates/rag.jinja" not in found


def test_folders_of_the_hub_cache(model, tmp_path):
    """There every file is a link into blobs, folders are true ones."""
    snapshot, blobs = tmp_path / "m" / "snapshots" / "01", tmp_path / "m" / "blobs"
    for number, name in enumerate(CARRIED):
        blobs.mkdir(parents=True, exist_ok=True)
        shutil.copy(model / name, blobs / f"{number:040x}")
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / f"{number:040x}", (snapshot / name).parent))
    assert set(companions(snapshot, set()).items()) == {(name, None) for name in CARRIED}
