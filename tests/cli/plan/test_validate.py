"""`mpq plan validate`: the verdict on a plan, alone and with a model."""

import mpq_kernels as mpq
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.plan.resolve import resolve


def test_validate(run_plan, tmp_path):
    assert "well formed, 5 rules" in run_plan("validate", "b.json").out
    assert "14 packed weights" not in run_plan("validate", "b.json").out
    resolved = resolve(mpq.Plan.from_file("b.json"), DenseCheckpoint.open("dense").linears())
    for model in ("dense", "bare/config.json"):
        assert f"{len(resolved.weights)} packed weights, 1 linear kept" in run_plan("validate", "b.json", model).out
        facts = run_plan("validate", "b.json", model, "--json").json()
        assert facts == {
            "plan": "b.json", "model": model, "rules": 5, "fuse": 1, "packed": len(resolved.weights), "kept": 1,
        }  # fmt: skip
    (tmp_path / "bad.json").write_text('{"version": 1, "defualt": {"bits": 4}}')
    refused = run_plan("validate", tmp_path / "bad.json", code=1)
    assert "defualt: unknown key; did you mean default" in refused.err and refused.out == ""
    (tmp_path / "other.json").write_text('{"version": 1, "modules": {"re:.*experts.*": {"bits": 4}}}')
    run_plan("validate", tmp_path / "other.json")
    assert "matches none" in run_plan("validate", tmp_path / "other.json", "dense", code=1).err
