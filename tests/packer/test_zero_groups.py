"""Groups whose scale vanishes are packed as zeros and counted; a scale that is too large stops with its cure."""

import pytest
import torch

import mpq_kernels as mpq
import mpq_kernels.packer.write
from mpq_kernels.calibrate.calibration import Calibration
from mpq_kernels.cli.pack import _print_report
from mpq_kernels.errors import QuantizeError
from mpq_kernels.plan.plan import WeightPlan
from tests.made.checkpoints import VOCAB, tiny_model
from tests.made.packed import digests

PLAN = mpq.Plan.from_dict({"version": 1, "default": {"bits": 4, "group_size": 32}, "modules": {}})
TEXT = Calibration(tokens=torch.randint(3, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0)))
EXPERT, LINEAR = "model.layers.1.mlp.experts.2.down_proj", "model.layers.0.self_attn.o_proj"


def model_with(value, path):
    """A mixture of which two groups of one expert and one of a linear are multiples of `value`."""
    model = tiny_model("qwen2_moe", path)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2][5, :] = torch.randn(48) * value
        model.model.layers[0].self_attn.o_proj.weight[7, 32:64] = torch.randn(32) * value
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e-40])
@pytest.mark.parametrize("quantizer", ["rtn", "hqq"])
def test_vanishing_groups_are_zeros_and_counted(quantizer, value, tmp_path, capsys):
    model_with(value, tmp_path / "m")
    plan = PLAN.model_copy(update={"modules": {"re:.*down_proj": WeightPlan(bits=4, group_size=16)}})
    report = mpq.pack(tmp_path / "m", tmp_path / "out", plan, quantizer)
    assert report.zero_groups == report.to_dict()["zero_groups"] == {EXPERT: 3, LINEAR: 1}
    _print_report(report)
    assert f"the dtype of the scales: 4 groups of {LINEAR}, {EXPERT}\n" in capsys.readouterr().out
    loaded = mpq.load(tmp_path / "out")
    assert not loaded.get_submodule(LINEAR).dequantize()[7, 32:64].any()
    with torch.no_grad():
        assert torch.isfinite(loaded(TEXT.tokens).logits).all()


def test_a_row_without_weights_is_zeros_with_gptq(tmp_path):
    """Of a whole row, in which no group makes up for another."""
    model = tiny_model("mistral", tmp_path / "m")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[7] = 0
        model.model.layers[1].mlp.up_proj.weight[3] = 1e-40
    model.save_pretrained(tmp_path / "m")
    report = mpq.pack(tmp_path / "m", tmp_path / "out", PLAN, "gptq", TEXT)
    assert report.zero_groups == {LINEAR: 2, "model.layers.1.mlp.up_proj": 2}


def test_what_a_killed_run_has_counted_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(mpq_kernels.packer.write, "COMMIT_SHARE", 0)
    model_with(0.0, tmp_path / "m")

    def stop(done, total, name):
        if done == total:
            raise KeyboardInterrupt

    plan = PLAN.model_copy(update={"modules": {"re:.*down_proj": WeightPlan(bits=4, group_size=16)}})
    with pytest.raises(KeyboardInterrupt):
        mpq.pack(tmp_path / "m", tmp_path / "out", plan, "rtn", progress=stop)
    report = mpq.pack(tmp_path / "m", tmp_path / "out", plan, "rtn", resume=True)
    assert report.zero_groups == {EXPERT: 3, LINEAR: 1} and report.resumed == report.parts - 1


def test_a_scale_that_is_too_large_is_mended_in_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(mpq_kernels.packer.write, "COMMIT_SHARE", 0)
    model = tiny_model("mistral", tmp_path / "m")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = 1e8
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(
        QuantizeError, match=r"up_proj: a scale of .* overflows float16 .*: use scale_dtype='bf"
    ) as caught:
        mpq.pack(tmp_path / "m", tmp_path / "out", PLAN, "rtn")
    assert "(--resume) goes on with it" in caught.value.__notes__[0]
    assert "also under another plan" in caught.value.__notes__[0]
    cured = WeightPlan(bits=4, group_size=32, scale_dtype="bfloat16")
    plan = PLAN.model_copy(update={"modules": {"model.layers.1.mlp.up_proj": cured}})
    report = mpq.pack(tmp_path / "m", tmp_path / "out", plan, "rtn", resume=True)
    before = [module.name for module in report.modules].index("model.layers.1.mlp.up_proj")
    assert report.resumed == before > 0
    mpq.pack(tmp_path / "m", tmp_path / "wanted", plan, "rtn")
    assert digests(tmp_path / "out") == digests(tmp_path / "wanted")
