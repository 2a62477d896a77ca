"""benchmarks/families: what a row says of a family that is right, of one that transformers refuses, of a wrong one."""

import json
import os
import signal

import pytest

from benchmarks.families import causal, check, pages, sweep
from benchmarks.families.cases import Case


def case(model_type: str, **changes) -> Case:
    found = next(each for each in causal.cases() if each.model_type == model_type)
    return Case("causal", model_type, found.auto, {**found.changes, **changes})


def test_a_family_that_is_right(tmp_path):
    row = check.check(case("llama"), tmp_path)
    assert (row.state, row.why, row.packed) == (check.RIGHT, "", row.linears)
    assert 0 < row.difference < check.LOGITS


def test_a_config_that_transformers_refuses(tmp_path):
    row = check.check(case("llama", num_attention_heads=5), tmp_path)
    assert row.state == check.NOT_JUDGED and "attention heads" in row.why


def test_a_weight_in_the_place_of_another_is_seen(tmp_path, monkeypatch):
    load = check.mpq.load

    def swapped(path):
        model = load(path)
        attention = model.model.layers[0].self_attn
        attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
        return model

    monkeypatch.setattr(check.mpq, "load", swapped)
    row = check.check(case("llama"), tmp_path)
    assert row.state == check.WRONG and "differs from its dense weight" in row.why


def test_a_process_that_dies_has_a_row_and_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "check", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    lines = tmp_path / "rows.jsonl"
    [row] = sweep.sweep([case("llama")], lines, gptq=False, again=False)
    assert row["state"] == check.CRASHED and "exit code -9" in row["why"]
    monkeypatch.setattr(sweep, "run", lambda *_: pytest.fail("its row is there"))
    assert list(sweep.sweep([case("llama")], lines, gptq=False, again=False)) == [row]


def test_the_page_lists_families_and_reasons():
    rows = [
        {"kind": "causal", "model_type": "good", "state": check.RIGHT, "why": ""},
        {"kind": "causal", "model_type": "odd", "state": check.REFUSED, "why": "has a|b"},
        {"kind": "causal", "model_type": "late", "state": check.LATE, "why": "x"},
    ]
    text = pages.page({"causal": "Causal"}, json.loads(json.dumps(rows)))
    for part in ("Packed: 1 of 3.", "`good`.", "| `odd` | has a\\|b |", "| `late` | refused late: x |"):
        assert part in text
    assert max(map(len, text.splitlines())) <= pages.WIDTH


# One of each kind of mapping between what is stored and what the model has.
MAPPED = (
    "gpt_neox", "granitemoe", "granitemoehybrid", "nemotron_h", "roberta", "zamba", "zamba2", "deepseek_v4", "jamba",
    "lfm2_moe", "phimoe", "hrm_text", "aria_text", "laguna", "exaone", "sarvam_moe", "hy_v3", "hy_v4", "lara_mini",
    "lfm3", "bert", "prophetnet", "gpt_oss", "mixtral", "minimax", "longcat_flash", "gemma3", "fuyu",
    "llama4_text", "inkling2_loop_text", "rwkv",
)  # fmt: skip


@pytest.mark.parametrize("model_type", MAPPED)
def test_a_family_of_each_kind_of_mapping(model_type, tmp_path):
    row = check.check(case(model_type), tmp_path)
    assert (row.state, row.why) == (check.RIGHT, "")
