"""Linears that are not nn.Linear are packed; a model most of whose linears are unknown is refused before any work."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

import mpq_kernels as mpq
from mpq_kernels.calibrate.calibration import Calibration
from tests.made.checkpoints import tiny_model
from tests.made.other_linears import OTHER_LINEARS, tiny_other
from tests.made.packed import UNIFORM, check_kept, check_packed

TOKENS = torch.randint(3, 160, (2, 12), generator=torch.Generator().manual_seed(3))


def with_weights_of(dense, packed):
    """The dense model with what the packed linears dequantize to."""
    for name, module in packed.named_modules():
        if isinstance(module, mpq.MixedLinear):
            linear, weight = dense.get_submodule(name), module.dequantize()
            weight = weight.T.contiguous() if type(linear).__name__ == "Conv1D" else weight
            linear.weight = torch.nn.Parameter(weight)  # a packed head is not the embedding
    return dense


@pytest.mark.parametrize("family", OTHER_LINEARS)
def test_they_are_packed_and_loaded(family, tmp_path):
    tiny_other(family, tmp_path / "model")
    report = mpq.pack(tmp_path / "model", tmp_path / "out", UNIFORM, quantizer="rtn")
    assert len(report.modules) == 9
    source, packed = check_packed(tmp_path / "model", tmp_path / "out", UNIFORM)
    check_kept(source, packed)
    model = mpq.load(tmp_path / "out")
    dense = with_weights_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), model)
    with torch.no_grad():
        logits, wanted = model(TOKENS).logits, dense(TOKENS).logits
    assert (logits - wanted).norm() <= 1e-5 * wanted.norm()  # fp32 sums in another order: tens of roundings of 2**-24
    in_memory = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert len(mpq.replace_linears(in_memory, UNIFORM, quantizer="rtn").replaced) == 9
    with torch.no_grad():
        assert torch.equal(in_memory(TOKENS).logits, logits)


def test_they_are_calibrated(tmp_path):
    """GPTQ under the inputs that they read leaves a smaller error in the logits than rounding."""
    dense = tiny_other("openai-gpt", tmp_path / "model")
    rules = {r"re:.*\.(c_attn|c_fc)": {"bits": 3, "group_size": -1}}
    plan = mpq.Plan.from_dict({"version": 1, "default": None, "modules": rules})
    tokens = torch.randint(0, 160, (16, 32), generator=torch.Generator().manual_seed(5))
    text = Calibration(tokens=tokens)
    errors = {}
    for quantizer, calibration in (("rtn", None), ("gptq", text)):
        mpq.pack(tmp_path / "model", tmp_path / quantizer, plan, quantizer=quantizer, calibration=calibration)
        with torch.no_grad():
            errors[quantizer] = (mpq.load(tmp_path / quantizer)(tokens).logits - dense(tokens).logits).norm().item()
    assert 0 < errors["gptq"] < 0.8 * errors["rtn"]


def test_a_model_of_unknown_linears_is_refused_before_any_work(tmp_path, monkeypatch):
    tiny_other("gpt2", tmp_path / "model")
    monkeypatch.setattr("mpq_kernels.dense.kinds.STORES_TRANSPOSED", {"torch.nn.modules.linear.Linear": False})
    words = r"0 of the 98,304 weights .* Conv1D \(such as transformer.h.0.attn.c_attn; 98,304 weights\).*--allow-dense"
    with pytest.raises(mpq.CheckpointError, match=words):
        mpq.pack(tmp_path / "model", tmp_path / "out", UNIFORM, quantizer="rtn")
    assert os.listdir(tmp_path) == ["model"]
    report = mpq.pack(tmp_path / "model", tmp_path / "out", UNIFORM, quantizer="rtn", allow_dense=True)
    assert [module.name for module in report.modules] == ["lm_head"]


def test_a_plan_that_keeps_everything_is_no_reason(tmp_path):
    tiny_model("llama", tmp_path / "model")
    plan = mpq.Plan.from_dict({"version": 1, "default": {"bits": 16}})
    assert mpq.pack(tmp_path / "model", tmp_path / "out", plan, quantizer="rtn").modules == ()
