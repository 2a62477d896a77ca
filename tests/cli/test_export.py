"""`mpq export`."""

import json

import pytest

from tests.made.foreign_checkpoints import awq_checkpoint


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    import mpq_kernels as mpq

    path = tmp_path_factory.mktemp("export")
    awq_checkpoint(path / "source")
    mpq.import_checkpoint(path / "source", path / "packed")
    return path / "packed"


def test_text_and_json(run, packed, tmp_path):
    text = run("export", packed, tmp_path / "new", "--to", "gptq")
    assert "model.layers.0.mlp.up_proj" in text.out and "4 bits, groups of 32" in text.out
    assert "14 linears" in text.out
    data = json.loads(run("export", packed, tmp_path / "other", "--to", "awq", "--json").out)
    assert data["to"] == "awq" and len(data["linears"]) == 14 and data["file_bytes"] > 0


def test_refusals(run, packed, tmp_path):
    assert "not empty" in run("export", packed, packed.parent, "--to", "bf16", code=1).err
    assert "gguf" in run("export", packed, tmp_path / "new", "--to", "gguf", code=2).err
    assert not (tmp_path / "new").exists()
