"""`mpq pack --dry-run`: exact bytes, and the refusals of `pack` itself."""

import json
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from mpq_kernels.checkpoint.packed import PackedCheckpoint
from tests.made.checkpoints import VOCAB, tiny_model
from tests.made.commands import HEAD


@pytest.mark.parametrize(
    ("words", "tied"),
    [
        (["--plan", "plan.json"], False),
        (["--bits", "5", "--lm-head", "4"], False),
        (["--bits", "5", "--lm-head", "4"], True),
        (["--bits", "3", "--zero", "float", "--scale-dtype", "float32"], True),
    ],
)
def test_dry_run_is_exact(run, tmp_path, space, words, tied):
    dense = tmp_path / "dense"
    tiny_model("qwen2" if tied else "llama", dense, tied=tied, sizes=HEAD)
    before = sorted(tmp_path.rglob("*"))
    data = run("pack", dense, tmp_path / "o", *words, "--dry-run", "--json").json()
    text = run("pack", dense, tmp_path / "o", *words, "--dry-run").out
    assert sorted(tmp_path.rglob("*")) == before
    run("pack", dense, tmp_path / "o", *words, "--quantizer", "rtn")
    checkpoint = PackedCheckpoint.open(tmp_path / "o")
    stored = {name: (str(t.dtype), list(t.shape), t.entry.nbytes) for name, t in checkpoint.tensors.items()}
    assert {t["name"]: (f"torch.{t['dtype']}", t["shape"], t["bytes"]) for t in data["tensors"]} == stored
    assert data["files"] == {file.name: file.stat().st_size for file in checkpoint.files.files}
    assert data["packed"]["total"] == checkpoint.size().packed.total_bytes
    assert f"all tensors {data['total_bytes']:,} bytes" in text


PLAN = {"version": 1, "default": {"bits": 1}}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["out", "--plan", "one.json", "--quantizer", "auto-round"], "cannot do"),
        (["out", "--bits", 4, "--group-size", 48], "48"),
        (["packed", "--bits", 4], "is not empty"),
        (["text.txt", "--bits", 4, "--overwrite"], "is a file"),
        (["nowhere/out", "--bits", 4], "there is no such directory"),
        (["dense/out", "--bits", 4], "overlaps"),
    ],
)
def test_refuses_what_pack_refuses_in_the_same_words(run, words, reason):
    Path("one.json").write_text(json.dumps(PLAN))
    text = ["--calibration", "text.txt"] if "auto-round" in words else []
    packed, dry = (run("pack", "dense", *words, *text, *more, code=1).err for more in ([], ["--dry-run"]))
    assert packed == dry and reason in dry


def test_a_mixture_is_refused_for_auto_round_in_both(run, tmp_path):
    tiny_model("mixtral", tmp_path / "dense")
    kept = {"re:.*experts.*": {"bits": 16}, "lm_head": {"bits": 16}}
    plan = {"version": 1, "default": {"bits": 4, "group_size": 32}, "modules": kept}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    words = ["pack", tmp_path / "dense", tmp_path / "o", "--plan", tmp_path / "plan.json", "--quantizer", "auto-round"]
    packed = run(*words, "--calibration", "text.txt", code=1).err
    assert packed == run(*words, "--dry-run", code=1).err and "mixture model" in packed


def test_an_older_output_may_be_asked_about(run):
    done = run("pack", "dense", "packed", "--bits", 4, "--dry-run", "--overwrite")
    assert "dry run: nothing is written" in done.out and "is not empty" not in done.err


def test_what_a_calibration_would_refuse_is_refused_in_both(run, tmp_path):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=64, state_size=8, num_hidden_layers=2)
    MambaForCausalLM(config).save_pretrained(tmp_path / "dense")
    words = ["pack", tmp_path / "dense", tmp_path / "o", "--bits", 4, "--group-size", -1, "--quantizer", "gptq"]
    dry = run(*words, "--dry-run", code=1).err
    assert "dt_proj: no token of the first 8 calibration tokens reaches this linear" in dry
    assert dry == run(*words, "--calibration", "text.txt", code=1).err
