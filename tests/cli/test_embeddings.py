"""Every command on packed embeddings: plan uniform, check, show, size, diff, allocate; pack, inspect, verify, bench."""

import json

import pytest

from mpq_kernels.cli import main
from tests.made.commands import EXAMPLES, Runner, dense_with_tokenizer

NAME = "model.embed_tokens"
DENSE = 2 * 2048 * 128  # bytes of the embedding in bf16


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A tied model with a tokenizer, packed with 4-bit embeddings, and two plans."""
    root = tmp_path_factory.mktemp("tied")
    dense_with_tokenizer(root / "dense", tied=True)
    uniform = ["plan", "uniform", str(root / "dense"), "--bits", "3"]
    assert main([*uniform, "-o", str(root / "kept.json"), "--quiet"]) == 0
    assert main([*uniform, "--embeddings", "4", "-o", str(root / "plan.json"), "--quiet"]) == 0
    pack = ["--bits", "3", "--embeddings", "4", "--quantizer", "rtn", "--quiet"]
    assert main(["pack", str(root / "dense"), str(root / "packed"), *pack]) == 0
    return root


@pytest.fixture
def run(tied, capsys, monkeypatch):
    monkeypatch.chdir(tied)
    return Runner(capsys)


def test_the_plan(run, tied):
    rules = json.loads((tied / "plan.json").read_text())["modules"]
    assert set(rules) == {NAME} and rules[NAME]["bits"] == 4
    assert set(json.loads((tied / "kept.json").read_text())["modules"]) == {"lm_head"}


def test_plan_commands(run):
    checked = run("plan", "check", "plan.json", "dense", "--json").json()
    row = next(row for row in checked["modules"] if row["name"] == NAME)
    assert row["embedding"] == {"shared": ["lm_head"]} and checked["kept"] == {}
    assert f"{NAME} = lm_head" in run("plan", "check", "plan.json", "dense").out
    shown = run("plan", "show", "plan.json", "dense").out
    assert [line.split()[-1] for line in shown.splitlines() if "embed_tokens" in line or "lm_head" in line] == [
        "4",
        "4",
    ]
    assert "embed_tokens" not in run("plan", "show", "kept.json", "dense").out
    size = run("plan", "size", "plan.json", "dense", "--json").json()
    before = run("plan", "size", "kept.json", "dense", "--json").json()
    assert size["packed"]["total"] - before["packed"]["total"] == row["bytes"]["total"]
    assert size["kept_bytes"] == before["kept_bytes"] == 0
    changed = run("plan", "diff", "kept.json", "plan.json", "dense", "--json").json()
    assert changed["bytes"] == row["bytes"]["total"] - DENSE
    assert {c["name"]: c["bytes"] for c in changed["changes"]} == {NAME: changed["bytes"], "lm_head": 0}
    assert "fits dense" in run("plan", "validate", "plan.json", "dense/config.json").out


def test_what_was_packed(run):
    held = run("inspect", "packed", "--json").json()
    row = next(row for row in held["modules"] if row["name"] == NAME)
    assert row["embedding"] == {"shared": ["lm_head"]} and held["kept"] == {}
    assert held["total"]["kept"] < DENSE / 10  # norms
    assert f"{NAME} = lm_head" in run("inspect", "packed").out
    layers = run("verify", "packed", "--against", "dense", "--json").json()["layers"]
    assert 0 < next(layer for layer in layers if layer["name"] == NAME)["relative_error"] < 0.2


def test_running_it(run, tied):
    (tied / "text.txt").write_text(
        (EXAMPLES / "gutenberg_val.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8"
    )
    assert run("ppl", "packed", "--text", "text.txt", "--max-tokens", 300, "--json", "--quiet").json()["ppl"] > 1
    assert run("generate", "packed", "--prompt", "The", "--max-new-tokens", 3, "--json").json()["new_tokens"] <= 3
    words = ["--prompt", 8, "--generate", 2, "--repetitions", 1, "--json", "--quiet"]
    stored = run("bench", "packed", *words).json()
    made = run("bench", "dense/config.json", "--plan", "plan.json", *words).json()
    assert stored["params"] == made["params"] and stored["packed"] == made["packed"]


def test_allocate(run, tied):
    words = ["plan", "allocate", "dense", "--budget", "3bits", "--bits", "2,3,4", "--quiet"]
    plan = run(*words, "--method", "frobenius", "--embeddings", "--json").json()["plan"]
    assert plan["modules"][NAME]["bits"] in (2, 3, 4) and "lm_head" not in plan["modules"]
    (tied / "allocated.json").write_text(json.dumps(plan))
    assert "fits dense" in run("plan", "validate", "allocated.json", "dense").out
    assert "--embeddings: --method trace looks at inputs" in run.misuse(
        *words, "--method", "trace", "--embeddings", "--calibration", "text.txt"
    )
