"""GPTQ for the experts of mixtures: Hessians of what is routed to each, and packed models that run as they should."""

import pytest
import torch
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

import mpq_kernels as mpq
from mpq_kernels.calibrate.calibration import Calibration
from mpq_kernels.calibrate.experts import Routed, in_walk_order, route
from mpq_kernels.calibrate.hessians import Calibrator, damped
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.cli.pack import _print_report
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.dense.experts import experts_modules
from mpq_kernels.errors import QuantizeError
from mpq_kernels.format.reference import dequantize
from mpq_kernels.plan.resolve import resolve
from mpq_kernels.quantize import quantize_weight
from tests.made.checkpoints import VOCAB, tiny_model
from tests.made.mixtures import dequantized_twin, expert_plan, packed_experts

# Stored one by one, the same with small experts, and merged: transposed, interleaved, with biases.
NAMES = ("mixtral", "qwen3_moe", "gpt_oss")
# More than one batch of 4096 tokens.
TOKENS = torch.randint(0, VOCAB, (90, 48), generator=torch.Generator().manual_seed(0))
FEW = TOKENS[:9]
DAMPING = 0.01


def mixture(family, path):
    """A tiny mixture whose tokens go to all experts."""
    model = tiny_model(family, path)
    if family == "gpt_oss":  # its biases are so much larger than its embedding that the router would see one token only
        model.model.embed_tokens.weight.data *= 50
        for layer in model.model.layers:
            layer.mlp.router.weight.data *= 10
        model.save_pretrained(path)


def made(family, path, tokens=FEW, **options):
    """(checkpoint, its experts' members in the order of calibration, calibrator, the model run by eager code)."""
    mixture(family, path)
    source = DenseCheckpoint.open(path)
    resolved = in_walk_order(resolve(expert_plan(path), source.linears()), source)
    members = [member for weight in resolved.weights if weight.experts for member in weight.members]
    calibration = Calibrator(source, Calibration(tokens=tokens, damping=DAMPING, **options))
    return source, members, calibration, AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager")


def reads(model, module, tokens):
    """(rows fp32 [tokens, hidden], experts [tokens, k]) of one module of experts in a plain run of the model."""
    seen = []
    hook = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return seen[0]


def between(family, x, gate, up, biases):
    """What the down projection reads, by the definition of the family's expert."""
    gate, up = x @ gate.T, x @ up.T
    if family != "gpt_oss":
        return silu(gate) * up
    gate, up = (gate + biases[0]).clamp(max=7.0), (up + biases[1]).clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def close(found, x, weights=None):
    """found is the damped mean of x^T x; fp32 sums, here and in the projections before, are off by 2^-24 times few."""
    x = x.double() if weights is None else x.double() * weights.double()[:, None].sqrt()
    wanted = damped(x.T @ x / (len(x) if weights is None else weights.double().sum()), DAMPING)
    return float((found - wanted).abs().max()) <= 2e-5 * float(wanted.diagonal().max())


def wanted_rows(family, source, read, member, scale=1.0):
    """(rows, their tokens) of a linear of an expert. read: by its module. scale: factor of its gate and up weights."""
    place = member.spec.expert
    x, chosen = read
    tokens = (chosen == place.index).any(1)
    if place.part != "down":
        return x[tokens], tokens
    parts = [
        spec
        for spec in source.linears()
        if spec.expert and (spec.expert.module, spec.expert.index) == (place.module, place.index)
    ][:2]
    assert [spec.expert.part for spec in parts] == ["gate", "up"]
    weights = [source.weight(spec) * scale for spec in parts]
    return between(family, x[tokens], *weights, [source.bias(spec) for spec in parts]), tokens


@pytest.mark.parametrize("family", NAMES)
def test_hessians_are_those_of_the_rows_routed_to_an_expert(family, tmp_path):
    source, members, calibration, model = made(family, tmp_path / "m", TOKENS)
    read = {name: reads(model, name, TOKENS) for name in experts_modules(model)}
    shared = None  # by gate and up of an expert
    for member in members:
        rows, _ = wanted_rows(family, source, read[member.spec.expert.module], member)
        assert 0 < len(rows) < TOKENS.numel()
        found = calibration.hessian(member.spec.name)
        assert close(found, rows), member.spec.name
        if member.spec.expert.part == "up":
            assert found is shared
        shared = found
    assert not calibration.unreached


@pytest.mark.parametrize("family", NAMES)
def test_what_follows_sees_the_quantized_experts(family, tmp_path):
    """All weights of experts are halved as they come: down then reads other rows, and so does the next block."""
    source, members, calibration, model = made(family, tmp_path / "m")
    for name, experts in experts_modules(model).items():
        read = reads(model, name, FEW)
        for member in (m for m in members if m.spec.expert.module == name):
            if member.spec.expert.index == 1:
                rows, _ = wanted_rows(family, source, read, member, 0.5)
                assert close(calibration.hessian(member.spec.name), rows), member.spec.name
            else:
                calibration.enter(member.spec.name)
            calibration.set_weight(member.spec.name, source.weight(member.spec) * 0.5)
        with torch.no_grad():
            experts.gate_up_proj.mul_(0.5)
            experts.down_proj.mul_(0.5)
        held = calibration.walk.model.get_submodule(name)
        assert torch.equal(held.gate_up_proj, experts.gate_up_proj) and torch.equal(held.down_proj, experts.down_proj)


def test_token_weights(tmp_path):
    source, members, calibration, model = made(
        "qwen3_moe", tmp_path / "m", token_weights=lambda hidden, tokens, block: (tokens % 3).float()
    )
    read = {name: reads(model, name, FEW) for name in experts_modules(model)}
    for member in members[::5]:
        rows, tokens = wanted_rows("qwen3_moe", source, read[member.spec.expert.module], member)
        assert close(calibration.hessian(member.spec.name), rows, (FEW % 3).reshape(-1)[tokens]), member.spec.name


@pytest.mark.parametrize("family", NAMES)
def test_weighted_error_is_lower_than_without_calibration(family, tmp_path):
    """tr(E H E^T), E = W - Q, over all experts, of which each has a width of its own, 1 to 8 bits."""
    source, members, calibration, _ = made(family, tmp_path / "m")
    lost = dict.fromkeys(("gptq", "calibrated hqq", "hqq"), 0.0)
    for member in members:
        weight, hessian = source.weight(member.spec), calibration.hessian(member.spec.name)
        for kind in lost:
            given = None if kind == "hqq" else hessian
            quantized = quantize_weight(weight, member.layout, None, kind.split()[-1], hessian=given)
            off = weight.double() - dequantize(quantized, torch.float64)
            lost[kind] += float(((off @ hessian) * off).sum())
    assert lost["gptq"] < 0.95 * lost["hqq"]
    assert lost["gptq"] < lost["calibrated hqq"] < lost["hqq"]


@pytest.mark.parametrize("family", NAMES)
def test_packed_mixtures_run_as_their_dequantized_weights_do(family, tmp_path):
    mixture(family, tmp_path / "m")
    plan, calibration = expert_plan(tmp_path / "m"), Calibration(tokens=FEW)
    report = mpq.pack(tmp_path / "m", tmp_path / "out", plan, "gptq", calibration)
    assert report.unreached == ()
    names = [module.name for module in report.modules]
    blocks = [int(name.split(".")[2]) for name in names]
    assert blocks == sorted(blocks), "weights are made in the order of the blocks"
    assert names[-2:] == [f"{names[-1].removesuffix('.down')}.{leaf}" for leaf in ("gate_up", "down")]
    PackedCheckpoint.open(tmp_path / "out").verify_values()
    model = mpq.load(tmp_path / "out")
    assert len(packed_experts(model)) == 2
    twin = dequantized_twin(model, tmp_path / "m")
    with torch.no_grad():
        found, wanted = model(TOKENS[:2]).logits, twin(TOKENS[:2]).logits
    # fp32 sums in another order, through two layers.
    assert float((found - wanted).norm()) <= 1e-4 * float(wanted.norm())
    ids = TOKENS[:1, :8]
    said = [m.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (model, twin)]
    assert torch.equal(*said)


CALIBRATED = "calibrated on all that their module reads: "


def test_experts_that_no_token_reaches(tmp_path, capsys):
    """One token reaches two of four experts of a layer; the others are calibrated as if all were routed to them."""
    source, members, calibration, model = made("qwen3_moe", tmp_path / "m", TOKENS[:1, :1])
    idle = set()
    read = {name: reads(model, name, TOKENS[:1, :1]) for name in experts_modules(model)}
    for member in members:
        place = member.spec.expert
        x, chosen = read[place.module]
        found = calibration.hessian(member.spec.name)
        if place.index not in chosen:
            idle.add(f"{place.block}.{place.index}")
        if place.part == "gate":
            assert close(found, x), "every expert reads the one token, or is treated as if it did"
        quantized = quantize_weight(source.weight(member.spec), member.layout, None, "gptq", hessian=found)
        assert torch.isfinite(dequantize(quantized)).all()
    assert len(idle) == 4 and set(calibration.unreached) == idle
    few = Calibration(tokens=TOKENS[:1, :1])
    report = mpq.pack(tmp_path / "m", tmp_path / "out", expert_plan(tmp_path / "m"), "gptq", few)
    assert set(report.unreached) == idle and report.to_dict()["unreached"] == report.unreached
    _print_report(report)
    assert f"no calibration token reached 4 experts, {CALIBRATED}{report.unreached[0]}" in capsys.readouterr().out


def test_tokens_without_weight_reach_no_expert():
    experts = type("Experts", (), {})()
    routed, index = Routed("m", experts), torch.tensor([[0, 1], [1, 2]])
    routed.add(torch.ones(1, 2, 4), index, torch.tensor([0.0, 1.0]))
    assert [routed.reached(e) for e in range(4)] == [False, True, True, False]
    with pytest.raises(QuantizeError, match="m: reads 2 rows for 2 choices of experts and 3 tokens"):
        routed.add(torch.ones(2, 4), index, torch.ones(3))
    with pytest.raises(QuantizeError, match="m: reads 1 rows for 2 choices of experts"):
        routed.add(torch.ones(1, 4), index, None)


def test_experts_that_a_batch_does_not_reach_are_refused(tmp_path):
    _, _, calibration, _ = made("mixtral", tmp_path / "m")
    with pytest.raises(QuantizeError, match="layers.1.mlp.experts: not every batch of tokens reaches these experts"):
        route(calibration.walk, "model.layers.1.mlp.experts", lambda index: None)  # the walk is in block 0


def test_nan_in_what_experts_read_is_refused(tmp_path):
    _, members, calibration, _ = made("mixtral", tmp_path / "m", TOKENS[:4])
    calibration.walk.hidden[0][:] = torch.nan
    with pytest.raises(QuantizeError, match="mlp.experts, gate_up of expert .: the calibration tokens give NaN"):
        for member in members:
            calibration.hessian(member.spec.name)


def test_activation_order_leaves_experts_alone(tmp_path):
    tiny_model("mixtral", tmp_path / "m")
    calibration = Calibration(tokens=TOKENS[:2], act_order=True)
    mpq.pack(tmp_path / "m", tmp_path / "out", expert_plan(tmp_path / "m"), "gptq", calibration)
    packed = PackedCheckpoint.open(tmp_path / "out")
    permuted = {bool(module.experts): set() for module in packed.modules.values()}
    for module in packed.modules.values():
        permuted[bool(module.experts)].add(module.layout.permuted)
    assert permuted == {True: {False}, False: {True}}


def test_a_plan_without_experts_keeps_its_order(tmp_path):
    tiny_model("mixtral", tmp_path / "m")
    source = DenseCheckpoint.open(tmp_path / "m")
    plan = mpq.Plan.from_dict({"version": 1, "default": None, "modules": {r"re:.*_proj": {"bits": 4}}})
    resolved = resolve(plan, source.linears())
    assert in_walk_order(resolved, source) is resolved
