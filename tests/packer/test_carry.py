"""Files that are carried along stand in the output with their bytes, folders too, in every way that leads there."""

import json
import os

import pytest
from transformers import PreTrainedTokenizerFast

from mpq_kernels.checkpoint.manifest import MANIFEST_FILE, changed_files, file_entry
from mpq_kernels.packer import pack as pack_model
from mpq_kernels.packer.carry import NOTE
from mpq_kernels.packer.pack import pack
from tests.made.checkpoints import tiny_model
from tests.made.packed import UNIFORM

FOLDERS = ("additional_chat_templates/rag.jinja", "assets/figures/logo.png")
CARD = "---\nlicense: mit\n---\n# A model\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("carry") / "model"
    tiny_model("llama", path, tied=True)
    (path / "README.md").write_text(CARD)
    for name in FOLDERS:
        (path / name).parent.mkdir(parents=True)
        (path / name).write_text(name)
    (path / "assets" / "run.py").write_text("")
    return path


def check(model, out, report):
    files = (*FOLDERS, "generation_config.json")
    assert sorted(report.copied) == sorted([*files, "README.md"]) and set(report.left) == {"assets/run.py"}
    for name in files:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert (out / "README.md").read_bytes() == CARD.encode() + NOTE
    carried = json.loads((out / MANIFEST_FILE).read_text())["carried"]
    assert carried == {name: file_entry(out / name) for name in sorted(report.copied)}
    assert changed_files(out) == {}


def test_folders_are_copied_and_the_card_says_how_to_load(model, tmp_path):
    report = pack(model, tmp_path / "out", UNIFORM, quantizer="rtn")
    check(model, tmp_path / "out", report)
    assert not (tmp_path / "out" / "assets" / "run.py").exists()
    (model / "README.md").write_bytes(CARD.encode() + NOTE)  # has the note already: it is not repeated
    try:
        check(model, tmp_path / "out", pack(model, tmp_path / "out", UNIFORM, quantizer="rtn", overwrite=True))
    finally:
        (model / "README.md").write_text(CARD)


def test_edits_of_carried_files_are_told(model, tmp_path):
    pack(model, tmp_path / "out", UNIFORM, quantizer="rtn")
    (tmp_path / "out" / FOLDERS[0]).write_text("another")
    os.unlink(tmp_path / "out" / FOLDERS[1])
    assert changed_files(tmp_path / "out") == {FOLDERS[0]: "changed", FOLDERS[1]: "missing"}


def test_a_run_that_ended_among_them_is_resumed(model, tmp_path, monkeypatch):
    real = pack_model.file_entry

    def stop(path):
        raise RuntimeError("killed")

    monkeypatch.setattr(pack_model, "file_entry", stop)
    with pytest.raises(RuntimeError):
        pack(model, tmp_path / "out", UNIFORM, quantizer="rtn")
    left = tmp_path / f".out.partial-{os.getpid()}"
    assert (left / FOLDERS[0]).exists()
    monkeypatch.setattr(pack_model, "file_entry", real)
    report = pack(model, tmp_path / "out", UNIFORM, quantizer="rtn", resume=True)
    assert report.resumed == report.parts
    check(model, tmp_path / "out", report)


def test_their_space_is_asked_for(model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pack_model, "check_space", lambda parent, needed, files: asked.append((needed, files)))
    pack(model, tmp_path / "out", UNIFORM, quantizer="rtn")
    found = list((tmp_path / "out").rglob("*"))
    assert asked == [(sum(path.stat().st_size for path in found if path.is_file()), len(found))]


def test_the_packed_directory_has_the_tokenizers_templates(tmp_path):
    """Named templates are saved in a folder; a tokenizer without them would take their name for the template."""
    from tokenizers import Tokenizer, models

    tiny_model("llama", tmp_path / "model")
    words = models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "rag": "look: {{ messages[0].content }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    pack(tmp_path / "model", tmp_path / "out", UNIFORM, quantizer="rtn")
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    message = [{"role": "user", "content": "hello"}]
    assert loaded.apply_chat_template(message, chat_template="rag", tokenize=False) == "look: hello"
