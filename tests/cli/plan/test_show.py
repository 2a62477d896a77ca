"""`mpq plan show|validate|size|diff`: pictures, sizes and differences of plans, without reading a weight."""

import importlib.util
import json
import shutil
import sys

import pytest

import mpq_kernels as mpq
from mpq_kernels.cli.plan.picture import COLOURS, Picture
from mpq_kernels.dense.checkpoint import DenseCheckpoint, LinearSpec
from mpq_kernels.plan.resolve import resolve
from tests.made.checkpoints import tiny_model
from tests.made.commands import Runner

A = {"version": 1, "default": {"bits": 4, "group_size": 32}, "modules": {"lm_head": {"bits": 16}}}
B = {
    "version": 1,
    "default": {"bits": 4, "group_size": 32},
    "modules": {
        "re:.*v_proj": {"bits": 6, "group_size": 32},
        "model.layers.0.self_attn.o_proj": {"bits": 4, "group_size": 32, "symmetric": True},
        "model.layers.1.mlp.up_proj": {"bits": 16},
        "model.layers.1.mlp.down_proj": {
            "bits": 4,
            "segments": [{"cols": [0, 64], "bits": 8}, {"cols": [64, None], "bits": 3, "group_size": 64}],
        },
        "lm_head": {"bits": 8, "group_size": -1},
    },
    "fuse": [{"name": "qk_proj", "members": ["q_proj", "k_proj"]}],
}
WIDTHS = [["4", "4", "6", "4", "4", "4", "4"], ["4", "4", "6", "4", "4", "16", "4.7"]]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A tiny dense model, its config alone, and two plans."""
    root = tmp_path_factory.mktemp("plans")
    tiny_model("mistral", root / "dense", tied=False, sizes={"intermediate_size": 192})
    (root / "bare").mkdir()
    shutil.copy(root / "dense" / "config.json", root / "bare")
    (root / "a.json").write_text(json.dumps(A))
    (root / "b.json").write_text(json.dumps(B))
    return root


@pytest.fixture
def run(space, capsys, monkeypatch):
    """Run a plan command in the fixture's directory; gives stdout and stderr."""
    monkeypatch.chdir(space)
    return Runner(capsys, "plan")


@pytest.mark.parametrize("model", ["dense", "bare/config.json"])
def test_show_is_a_row_for_each_layer(run, model):
    lines = [line.split() for line in run("show", "b.json", model).out.splitlines()]
    assert lines[0] == ["layer", *PROJECTIONS, "other"]
    assert lines[1:] == [["0", *WIDTHS[0]], ["1", *WIDTHS[1]], ["lm_head", "8"]]
    data = run("show", "b.json", model, "--json").json()
    assert data["columns"] == [*PROJECTIONS, "other"]
    down = data["layers"][1]["linears"]["down_proj"]
    assert down == {"names": ["model.layers.1.mlp.down_proj"], "bits": [8, 3], "mean": (8 * 64 + 3 * 128) / 192}
    assert data["layers"][2] == {
        "layer": "lm_head",
        "linears": {"other": {"names": ["lm_head"], "bits": [8], "mean": 8}},
    }


def test_names_are_shortened_only_where_they_stay_apart():
    def linear(name):
        return LinearSpec(name, 64, 64, f"{name}.weight")

    linears = [linear(f"{part}.{i}.{p}") for part in ("enc", "dec") for i in (0, 1) for p in ("a.proj", "b.proj")]
    picture = Picture.of(resolve(mpq.Plan.uniform(linears, bits=2), linears), linears)
    assert picture.rows == ("enc.0", "enc.1", "dec.0", "dec.1") and picture.columns == ("a.proj", "b.proj")
    assert {cell.colour for cell in picture.cells.values()} == {COLOURS[2]}


def test_experts_share_a_column():
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in (0, 1) for e in (0, 1, 2)]
    linears = [LinearSpec(name, 64, 64, f"{name}.weight") for name in names]
    plan = mpq.Plan.from_dict({"version": 1, "default": {"bits": 2}, "modules": {names[1]: {"bits": 5}}})
    picture = Picture.of(resolve(plan, linears), linears)
    assert picture.rows == ("0", "1") and picture.columns == ("up_proj",)
    assert [picture.cells[row, "up_proj"].text for row in ("0", "1")] == ["3.0", "2"]
    assert picture.cells["0", "up_proj"].names == tuple(names[:3])


def test_png_holds_the_widths_or_is_refused_in_words(run, tmp_path, monkeypatch):
    if importlib.util.find_spec("matplotlib"):
        from matplotlib.image import imread

        run("show", "b.json", "dense", "--png", tmp_path / "b.png")
        image = imread(tmp_path / "b.png")
        seen = {
            tuple(round(float(c) * 255) for c in pixel[:3]) for pixel in image[::4, ::4].reshape(-1, image.shape[2])
        }
        wanted = {tuple(int(COLOURS[bits][i : i + 2], 16) for i in (1, 3, 5)) for bits in (4, 5, 6, 8, 16)}
        assert wanted <= seen
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused = run("show", "b.json", "dense", "--png", tmp_path / "no.png", code=1)
    assert "pip install 'mpq_kernels[plot]'" in refused.err and not (tmp_path / "no.png").exists()


@pytest.mark.parametrize("model", ["dense", "bare/config.json"])
def test_size_is_that_of_the_packed_files(run, tmp_path, model):
    data = run("size", "b.json", model, "--json").json()
    report = mpq.pack("dense", tmp_path / "out", mpq.Plan.from_file("b.json"), quantizer="rtn")
    parts = ("codes", "scales", "zeros", "metadata", "padding")
    assert {name: data["packed"][name] * 8 for name in parts} == {name: getattr(report.packed, name) for name in parts}
    assert data["packed"]["total"] == report.packed.total_bytes and data["packed"]["bpw"] == report.bpw
    assert data["kept"] == {"model.layers.1.mlp.up_proj": 192 * 64 * 4} and data["kept_bytes"] == 192 * 64 * 4
    text = run("size", "b.json", model).out
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    assert rows["total"] == [f"{report.packed.total_bytes:,}", f"{report.bpw:.4g}"]
    assert sum(float(rows[name][1]) for name in parts) == pytest.approx(report.bpw, abs=1e-2)


def test_diff_lists_what_changed_and_adds_up(run):
    data = run("diff", "a.json", "b.json", "dense", "--json").json()
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
    text = run("diff", "a.json", "b.json", "dense").out
    assert f"10 of 15 linears differ; {data['bytes_a']:,} -> {data['bytes_b']:,} bytes ({data['bytes']:+,})" in text
    assert "8|3 bits, group 64, int, float16, 2 segments" in text.replace("\n", " ")


def test_diff_is_empty_for_the_same_and_its_own_inverse(run):
    assert run("diff", "b.json", "b.json", "dense", "--json").json()["changes"] == []
    there = run("diff", "a.json", "b.json", "dense", "--json").json()
    back = run("diff", "b.json", "a.json", "dense", "--json").json()
    assert back["bytes"] == -there["bytes"]
    assert [c["name"] for c in back["changes"]] == [c["name"] for c in there["changes"]]


def test_a_permutation_is_a_difference_that_is_not_printed_whole(run, tmp_path):
    permuted = json.loads(json.dumps(A))
    permuted["modules"]["model.layers.0.mlp.gate_proj"] = A["default"] | {"perm": list(range(63, -1, -1))}
    (tmp_path / "p.json").write_text(json.dumps(permuted))
    data = run("diff", "a.json", tmp_path / "p.json", "dense", "--json").json()
    (change,) = data["changes"]
    assert set(change["changed"]) == {"permuted", "perm"} and "perm" not in change["b"]
    assert data["bytes"] == 64 * 4  # int32 for each column


def test_validate(run, tmp_path):
    assert "well formed, 5 rules" in run("validate", "b.json").out
    assert "14 packed weights" not in run("validate", "b.json").out
    resolved = resolve(mpq.Plan.from_file("b.json"), DenseCheckpoint.open("dense").linears())
    for model in ("dense", "bare/config.json"):
        assert f"{len(resolved.weights)} packed weights, 1 linears kept" in run("validate", "b.json", model).out
        facts = run("validate", "b.json", model, "--json").json()
        assert facts == {
            "plan": "b.json", "model": model, "rules": 5, "fuse": 1, "packed": len(resolved.weights), "kept": 1,
        }  # fmt: skip
    (tmp_path / "bad.json").write_text('{"version": 1, "defualt": {"bits": 4}}')
    refused = run("validate", tmp_path / "bad.json", code=1)
    assert "defualt: unknown key; did you mean default" in refused.err and refused.out == ""
    (tmp_path / "other.json").write_text('{"version": 1, "modules": {"re:.*experts.*": {"bits": 4}}}')
    run("validate", tmp_path / "other.json")
    assert "matches none" in run("validate", tmp_path / "other.json", "dense", code=1).err


def test_check_and_uniform_take_a_config_alone(run):
    for words in (("check", "b.json"), ("check", "b.json", "--json")):
        name, *rest = words
        assert run(name, *rest[:1], "dense", *rest[1:]).out == run(name, *rest[:1], "bare/config.json", *rest[1:]).out
    words = ["--bits", 3, "--group-size", 32]
    assert run("uniform", "dense", *words).out == run("uniform", "bare/config.json", *words).out
