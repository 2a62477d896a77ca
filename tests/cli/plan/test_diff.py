"""`mpq plan diff`: what two plans treat differently, adding up."""

import json

from tests.made.plans import A


def test_diff_lists_what_changed_and_adds_up(run_plan):
    data = run_plan("diff", "a.json", "b.json", "dense", "--json").json()
    changed = {change["name"]: set(change["changed"]) for change in data["changes"]}
    wanted = {f"model.layers.{i}.self_attn.{p}": {"fused"} for i in (0, 1) for p in ("q_proj", "k_proj")}
    wanted |= {f"model.layers.{i}.self_attn.v_proj": {"bits"} for i in (0, 1)}
    wanted["model.layers.0.self_attn.o_proj"] = {"zeros"}
    wanted["model.layers.1.mlp.down_proj"] = {"bits", "group", "cuts"}
    assert {name: changed[name] for name in wanted} == wanted
    assert set(changed) - set(wanted) == {"model.layers.1.mlp.up_proj", "lm_head"}
    assert sum(change["bytes"] for change in data["changes"]) == data["bytes"] == data["bytes_b"] - data["bytes_a"]
    sizes = {change["name"]: change["bytes"] for change in data["changes"]}
    assert sizes["model.layers.0.self_attn.v_proj"] == 64 * 64 * 2 // 8  # 32 rows, padded to 64
    assert sizes["model.layers.0.self_attn.o_proj"] == -64 * 2  # a byte of zero for each of 2 groups
    up = 192 * 64 * 4 - (192 * 64 * 4 // 8 + 192 * 2 * 3)
    assert sizes["model.layers.1.mlp.up_proj"] == up
    text = run_plan("diff", "a.json", "b.json", "dense").out
    assert f"10 of 15 linears differ; {data['bytes_a']:,} -> {data['bytes_b']:,} bytes ({data['bytes']:+,})" in text
    assert "8|3 bits, group 64, int, float16, 2 segments" in text.replace("\n", " ")


def test_diff_is_empty_for_the_same_and_its_own_inverse(run_plan):
    assert run_plan("diff", "b.json", "b.json", "dense", "--json").json()["changes"] == []
    there = run_plan("diff", "a.json", "b.json", "dense", "--json").json()
    back = run_plan("diff", "b.json", "a.json", "dense", "--json").json()
    assert back["bytes"] == -there["bytes"]
    assert [c["name"] for c in back["changes"]] == [c["name"] for c in there["changes"]]


def test_a_permutation_is_a_difference_that_is_not_printed_whole(run_plan, tmp_path):
    permuted = json.loads(json.dumps(A))
    permuted["modules"]["model.layers.0.mlp.gate_proj"] = A["default"] | {"perm": list(range(63, -1, -1))}
    (tmp_path / "p.json").write_text(json.dumps(permuted))
    data = run_plan("diff", "a.json", tmp_path / "p.json", "dense", "--json").json()
    (change,) = data["changes"]
    assert set(change["changed"]) == {"permuted", "perm"} and "perm" not in change["b"]
    assert data["bytes"] == 64 * 4  # int32 for each column
