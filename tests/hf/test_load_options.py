"""Keywords of `load` that are transformers' own: passed on, decided here, or unknown; links; the model's class."""

import json
import shutil

import pytest
import torch
import transformers

import mpq_kernels as mpq
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.dense.model import model_class
from mpq_kernels.hf.load import DECIDED
from mpq_kernels.nn.linear import packed_modules
from tests.made.checkpoints import tiny_model

IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    """A dense Qwen2 with what a sentence embedder has beside it, and the same packed, both in one folder."""
    root = tmp_path_factory.mktemp("options")
    tiny_model("qwen2", root / "dense", tied=False)
    (root / "dense" / "1_Pooling").mkdir()
    (root / "dense" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (root / "dense" / "modules.json").write_text("[]")
    mpq.pack(root / "dense", root / "packed", mpq.Plan.uniform(root / "dense", bits=4, group_size=32), quantizer="rtn")
    return root


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_keywords_of_transformers_are_passed_on(dirs):
    eager = mpq.load(dirs / "packed", attn_implementation="eager", use_cache=False)
    assert eager.config._attn_implementation == "eager" and eager.config.use_cache is False
    wanted = mpq.load(dirs / "packed")
    assert wanted.config._attn_implementation != "eager"
    assert (logits(eager) - logits(wanted)).norm() <= 1e-5 * logits(wanted).norm()


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"model": "cpu", "lm_head": torch.device("cpu")}, None])
def test_device_map_in_place_of_a_device(dirs, device_map):
    pytest.importorskip("accelerate", reason="only a program that places modules needs it")
    model = mpq.load(dirs / "packed", device_map=device_map, backend="reference", max_memory={"cpu": "1GB"})
    assert {module.backend for _, module in packed_modules(model)} == {"reference"}
    assert torch.equal(logits(model), logits(mpq.load(dirs / "packed", backend="reference")))


def test_a_device_map_that_no_backend_serves_is_refused(dirs):
    with pytest.raises(mpq.UnsupportedError, match="cuda"):
        mpq.load(dirs / "packed", device_map={"model.layers": 0, "": "cpu"}, activations="int8")
    with pytest.raises(mpq.UnsupportedError, match="either device or device_map"):
        mpq.load(dirs / "packed", "cpu", device_map="auto")


@pytest.mark.parametrize("name", DECIDED)
def test_what_load_decides_cannot_be_given(dirs, name):
    with pytest.raises(mpq.UnsupportedError, match=f"load takes no {name}: "):
        mpq.load(dirs / "packed", **{name: "x"})


def test_unknown_keywords_are_refused(dirs):
    with pytest.raises(mpq.UnsupportedError, match="load takes no colour: transformers does not know it"):
        mpq.load(dirs / "packed", colour="red")


def link_files(source, links):
    """A folder of links to files, and to folders."""
    links.mkdir()
    for path in source.iterdir():
        (links / path.name).symlink_to(path)


def link_files_twice(source, links):
    link_files(source, links.with_name("between"))
    link_files(links.with_name("between"), links)


def link_folder(source, links):
    links.symlink_to(source)


def link_into_the_cache(source, links):
    """Links to a snapshot of Hugging Face's cache, whose files are links themselves."""
    cache = links.with_name("models--a--b")
    for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        blob, name = cache / "blobs" / f"{number:040x}", cache / "snapshots" / "0123" / path.relative_to(source)
        for made in (blob, name):
            made.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        name.symlink_to(blob)
    link_files(cache / "snapshots" / "0123", links)


@pytest.mark.parametrize("link", [link_files, link_files_twice, link_folder, link_into_the_cache])
def test_models_behind_links(dirs, link, tmp_path):
    link(dirs / "dense", tmp_path / "dense")
    (tmp_path / "2").mkdir()
    link(dirs / "packed", tmp_path / "2" / "packed")
    source = DenseCheckpoint.open(tmp_path / "dense")
    assert "modules.json" in source.other_files()
    if link is not link_into_the_cache:  # there, folders are true ones
        assert "1_Pooling/config.json" in source.other_files() and source.left_files() == {}
    plan = mpq.Plan.uniform(tmp_path / "dense", bits=4, group_size=32)
    mpq.pack(tmp_path / "dense", tmp_path / "out", plan, quantizer="rtn")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (dirs / "packed" / file).read_bytes()
    assert torch.equal(logits(mpq.load(tmp_path / "2" / "packed")), logits(mpq.load(dirs / "packed")))


def test_a_folder_of_links_does_not_reach_further(dirs, tmp_path):
    link_files(dirs / "dense", tmp_path / "links")
    (tmp_path / "secret.json").write_text("{}")
    for name, target in (("a.json", tmp_path / "secret.json"), ("b.json", dirs / "dense" / "modules.json")):
        (tmp_path / "links" / name).symlink_to(target)
    (tmp_path / "links" / "folder").symlink_to(tmp_path)
    left = DenseCheckpoint.open(tmp_path / "links").left_files()
    assert set(left) == {"a.json", "b.json", "folder/"} and "outside the directory" in left["a.json"]


@pytest.mark.parametrize(
    ("model_type", "values", "name"),
    [
        ("qwen2", {}, "Qwen2ForCausalLM"),
        ("qwen3_vl", {}, "Qwen3VLForConditionalGeneration"),
        ("qwen2_audio", {}, "Qwen2AudioForConditionalGeneration"),
        ("whisper", {"architectures": ["OldWhisper"]}, "WhisperForConditionalGeneration"),
        ("t5", {}, "T5ForConditionalGeneration"),
        ("albert", {}, "AlbertForMaskedLM"),
        ("vit", {}, "ViTModel"),
    ],
)
def test_the_class_where_config_names_none(model_type, values, name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} | values))
    assert model_class(tmp_path) is getattr(transformers, name)
