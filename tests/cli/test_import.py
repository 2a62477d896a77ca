"""`mpq import`."""

import json

import pytest

from tests.made.foreign_checkpoints import awq_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("awq") / "source"
    awq_checkpoint(path)
    return path


def test_text_and_json(run, source, tmp_path):
    text = run("import", source, tmp_path / "out")
    assert "model.layers.0.mlp.up_proj" in text.out and "awq gemm, 4 bits, groups of 32" in text.out
    assert "kept 1: not quantized in the source" in text.out.replace("lm_head", "1") or "lm_head" in text.out
    assert "not copied: quantize_config.json (says how the source was quantized)" in text.err
    data = json.loads(run("import", source, tmp_path / "out", "--from", "awq", "--overwrite", "--json").out)
    assert data["format"] == "awq" and len(data["taken"]) == 14 and data["packed"]["bpw"] > 4
    assert run("verify", tmp_path / "out").out


def test_refusals(run, source, tmp_path):
    assert "AWQ" not in run("import", source, tmp_path / "out", "--from", "nothing", code=2).out
    assert "give one" in run("import", source, tmp_path / "out", "--resume", "--restart", code=2).err
    assert "qzeros" in run("import", source, tmp_path / "out", "--from", "gptq", code=1).err
