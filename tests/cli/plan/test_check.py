"""`mpq plan check`: what it promises is what `pack` writes; plans that do not fit are refused by both."""

import json
from pathlib import Path

import pytest

from mpq_kernels.checkpoint.packed import PackedCheckpoint


def test_plan_check_promises_what_pack_writes(run):
    data = run("plan", "check", "plan.json", "dense", "--json").json()
    checkpoint = PackedCheckpoint.open("mixed")
    assert [module["name"] for module in data["modules"]] == list(checkpoint.modules)
    for module in data["modules"]:
        tensors = checkpoint.weight(module["name"]).tensors().values()
        assert module["bytes"]["total"] == sum(tensor.nbytes for tensor in tensors)
    assert data["total"]["total"] == checkpoint.size().packed.total_bytes
    assert data["kept"] == {"lm_head": "plan: 16 bits"}
    text = run("plan", "check", "plan.json", "dense").out
    assert all(module["name"] in text for module in data["modules"])
    assert "3|5" in text
    assert f"{data['total']['total']:,}" in text


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"version": 1, "modules": {"model.layers.9.mlp.up_proj": {"bits": 4}}}, "model.layers.9.mlp.up_proj"),
        ({"version": 1, "default": {"bits": 4, "group_size": 48}}, "48"),
        ({"version": 1, "default": {"bits": 4}, "surprise": 1}, "surprise"),
        ({"version": 7}, "version 7"),
    ],
)
def test_plans_that_do_not_fit_are_refused(run, tmp_path, plan, words):
    (tmp_path / "bad.json").write_text(json.dumps(plan))
    for command in (
        ["plan", "check", tmp_path / "bad.json", "dense"],
        ["pack", "dense", "o", "--plan", tmp_path / "bad.json"],
    ):
        refused = run(*command, code=1)
        assert words in refused.err
        assert refused.out == ""
    assert not Path("o").exists()


def test_check_and_uniform_take_a_config_alone(run_plan):
    for words in (("check", "b.json"), ("check", "b.json", "--json")):
        command, plan, *flags = words
        stored, bare = (run_plan(command, plan, model, *flags).out for model in ("dense", "bare/config.json"))
        assert stored == bare
    words = ["--bits", 3, "--group-size", 32]
    assert run_plan("uniform", "dense", *words).out == run_plan("uniform", "bare/config.json", *words).out
