"""`mpq plan size`: the bytes of the packed files, by purpose."""

import pytest

import mpq_kernels as mpq


@pytest.mark.parametrize("model", ["dense", "bare/config.json"])
def test_size_is_that_of_the_packed_files(run_plan, tmp_path, model):
    data = run_plan("size", "b.json", model, "--json").json()
    report = mpq.pack("dense", tmp_path / "out", mpq.Plan.from_file("b.json"), quantizer="rtn")
    parts = ("codes", "scales", "zeros", "metadata", "padding")
    assert {name: data["packed"][name] * 8 for name in parts} == {name: getattr(report.packed, name) for name in parts}
    assert data["packed"]["total"] == report.packed.total_bytes and data["packed"]["bpw"] == report.bpw
    assert data["kept"] == {"model.layers.1.mlp.up_proj": 192 * 64 * 4} and data["kept_bytes"] == 192 * 64 * 4
    text = run_plan("size", "b.json", model).out
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    assert rows["total"] == [f"{report.packed.total_bytes:,}", f"{report.bpw:.4g}"]
    assert sum(float(rows[name][1]) for name in parts) == pytest.approx(report.bpw, abs=1e-2)
