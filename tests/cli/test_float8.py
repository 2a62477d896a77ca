"""Commands on linears in float8: plan check, show, size, diff; pack, inspect, verify."""

import json

import pytest
import torch

from mpq_kernels.cli import main
from tests.made.checkpoints import tiny_model
from tests.made.commands import Runner

DOWN = "model.layers.1.mlp.down_proj"
BYTES = 64 * 128 + 4 * 64


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    root = tmp_path_factory.mktemp("float8")
    tiny_model("qwen2", root / "dense", tied=False, dtype=torch.bfloat16)
    rules = {"version": 1, "default": {"bits": 4}, "modules": {"lm_head": {"bits": 16}}}
    (root / "codes.json").write_text(json.dumps(rules))
    rules["modules"][DOWN] = {"bits": 8, "dtype": "float8_e4m3fn"}
    (root / "plan.json").write_text(json.dumps(rules))
    pack = ["--plan", str(root / "plan.json"), "--quantizer", "rtn", "--quiet"]
    assert main(["pack", str(root / "dense"), str(root / "packed"), *pack]) == 0
    return root


@pytest.fixture
def run(space, capsys, monkeypatch):
    monkeypatch.chdir(space)
    return Runner(capsys)


def test_plan_commands(run):
    checked = run("plan", "check", "plan.json", "dense", "--json").json()
    assert [(row["name"], row["bytes"]["total"]) for row in checked["float8"]] == [(DOWN, BYTES)]
    assert "fp8" in run("plan", "check", "plan.json", "dense").out
    sizes = [
        run("plan", "size", name, "dense", "--json").json()["packed"]["total"] for name in ("plan.json", "codes.json")
    ]
    changed = run("plan", "diff", "codes.json", "plan.json", "dense", "--json").json()
    assert [c["name"] for c in changed["changes"]] == [DOWN] and changed["bytes"] == sizes[0] - sizes[1] > 0
    shown = run("plan", "show", "plan.json", "dense", "--json").json()
    assert shown["layers"][1]["linears"]["mlp.down_proj" if "mlp.down_proj" in shown["columns"] else "down_proj"][
        "bits"
    ] == [8]


def test_what_was_packed(run, tmp_path):
    held = run("inspect", "packed", "--json").json()
    assert [(row["name"], row["bytes"]["total"]) for row in held["float8"]] == [(DOWN, BYTES)]
    assert held["total"]["total"] == BYTES + sum(row["bytes"]["total"] for row in held["modules"])
    assert f"{DOWN} " in run("inspect", "packed").out
    layers = run("verify", "packed", "--against", "dense", "--json").json()["layers"]
    found = next(layer for layer in layers if layer["name"] == DOWN)
    assert found["bits"] == "fp8" and 0 < found["relative_error"] < 0.04
    planned = run("pack", "dense", tmp_path / "o", "--plan", "plan.json", "--dry-run", "--json").json()
    assert planned["packed"]["total"] == held["total"]["total"]
    assert {"name": f"{DOWN}.qweight", "dtype": "float8_e4m3fn", "shape": [64, 128], "bytes": 64 * 128} in planned[
        "tensors"
    ]
