"""`mpq plan show`: a row for each layer, on the terminal and as PNG."""

import importlib.util
import sys

import pytest

import mpq_kernels as mpq
from mpq_kernels.cli.plan.picture import COLOURS, Picture
from mpq_kernels.dense.checkpoint import LinearSpec
from mpq_kernels.plan.resolve import resolve
from tests.made.plans import PROJECTIONS, WIDTHS


@pytest.mark.parametrize("model", ["dense", "bare/config.json"])
def test_show_is_a_row_for_each_layer(run_plan, model):
    lines = [line.split() for line in run_plan("show", "b.json", model).out.splitlines()]
    assert lines[0] == ["layer", *PROJECTIONS, "other"]
    assert lines[1:] == [["0", *WIDTHS[0]], ["1", *WIDTHS[1]], ["lm_head", "8"]]
    data = run_plan("show", "b.json", model, "--json").json()
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


def test_png_holds_the_widths_or_is_refused_in_words(run_plan, tmp_path, monkeypatch):
    if importlib.util.find_spec("matplotlib"):
        from matplotlib.image import imread

        run_plan("show", "b.json", "dense", "--png", tmp_path / "b.png")
        image = imread(tmp_path / "b.png")
        seen = {
            tuple(round(float(c) * 255) for c in pixel[:3]) for pixel in image[::4, ::4].reshape(-1, image.shape[2])
        }
        wanted = {tuple(int(COLOURS[bits][i : i + 2], 16) for i in (1, 3, 5)) for bits in (4, 5, 6, 8, 16)}
        assert wanted <= seen
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused = run_plan("show", "b.json", "dense", "--png", tmp_path / "no.png", code=1)
    assert "pip install 'mpq_kernels[plot]'" in refused.err and not (tmp_path / "no.png").exists()
