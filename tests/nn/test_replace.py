"""replace_linears: what is replaced, what is left and why."""

import pytest
import torch

from mpq_kernels import MixedLinear, Plan, PlanError, QuantizeError, replace_linears
from mpq_kernels.dense.names import list_linears
from mpq_kernels.nn.fused import FusedLinear, FusedMember
from tests.made.checkpoints import tiny_model

FUSE = [
    {"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]},
    {"name": "gate_up_proj", "members": ["gate_proj", "up_proj"]},
]


def test_report_and_numbers(tmp_path):
    model = tiny_model("qwen2", tmp_path / "m", tied=True)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        before = model(ids).logits
    rule = {"bits": 8, "group_size": 32}
    plan = Plan.model_validate(
        {
            "version": 1,
            "default": rule,
            "modules": {"lm_head": {"bits": 16}, "re:.*v_proj": {"bits": 6, "group_size": 32}},
            "fuse": FUSE,
        }
    )
    seen = []
    report = replace_linears(model, plan, "rtn", progress=lambda done, total, name: seen.append((done, total, name)))
    names = {spec.name for spec in list_linears(tiny_model("qwen2", tmp_path / "n", tied=True))}
    assert set(report.replaced) == names - {"lm_head"}
    assert "plan: 16 bits" in report.left["lm_head"]
    assert report.left["model.embed_tokens"] == "Embedding is not an nn.Linear"
    assert "bits=8|6" in report.replaced["model.layers.0.self_attn.v_proj"]
    assert seen[-1][0] == seen[-1][1] == len(seen) == 8
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.qkv_proj, FusedLinear) and isinstance(attention.k_proj, FusedMember)
    assert attention.qkv_proj.bias is not None and type(attention.o_proj) is MixedLinear
    with torch.no_grad():
        after = model(ids).logits
    assert (after - before).norm() < 0.03 * before.norm()


def test_a_tied_head_is_untied(tmp_path):
    model = tiny_model("llama", tmp_path / "m", tied=True)
    embedding = model.model.embed_tokens.weight
    replace_linears(model, Plan.uniform(list_linears(model), bits=8, group_size=-1, lm_head=8), "rtn")
    assert isinstance(model.lm_head, MixedLinear) and model.model.embed_tokens.weight is embedding
    assert "lm_head.weight" not in model.all_tied_weights_keys


def test_a_plan_for_another_model_changes_nothing(tmp_path):
    model = tiny_model("llama", tmp_path / "m")
    plan = Plan.model_validate({"version": 1, "modules": {"transformer.h.0.attn": {"bits": 4}}})
    with pytest.raises(PlanError, match="transformer.h.0.attn"):
        replace_linears(model, plan, "rtn")
    assert not any(isinstance(module, MixedLinear) for module in model.modules())


def test_nan_names_the_module(tmp_path):
    model = tiny_model("llama", tmp_path / "m")
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(QuantizeError, match=r"model\.layers\.1\.self_attn\.o_proj"):
        replace_linears(model, Plan.uniform(list_linears(model), bits=4, group_size=-1), "rtn")


def test_a_quantizer_that_needs_calibration_is_refused(tmp_path):
    model = tiny_model("llama", tmp_path / "m")
    with pytest.raises(QuantizeError, match="'gptq' needs calibration, which only `pack` gives it"):
        replace_linears(model, Plan.model_validate({"version": 1, "default": {"bits": 4, "group_size": -1}}), "gptq")
    assert not any(isinstance(module, MixedLinear) for module in model.modules())
