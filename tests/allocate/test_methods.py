"""Importance methods against direct calculations, and what they leave behind."""

import copy
import math

import pytest
import torch

from mpq_kernels import Plan, replace_linears
from mpq_kernels.allocate import Budget, allocate, make_choices, make_units
from mpq_kernels.allocate.inputs import layer_cosines, output_gradients
from mpq_kernels.allocate.measured import probes, refine
from mpq_kernels.allocate.methods import DAMPING, METHODS, check_method
from mpq_kernels.allocate.scores import CLUSTERS, cluster_entropy, output_relevance
from mpq_kernels.allocate.study import Study, weight_view
from mpq_kernels.calibrate.hessians import damped
from mpq_kernels.dense.names import list_linears
from mpq_kernels.errors import PlanError, UnsupportedError
from mpq_kernels.format.reference import dequantize
from mpq_kernels.plan.resolve import resolve
from mpq_kernels.quantize import quantize_weight
from tests.made.checkpoints import VOCAB, tiny_model

TOKENS = torch.randint(0, VOCAB, (6, 32), generator=torch.Generator().manual_seed(3))
CHOICES = make_choices([1, 2, 3, 4, 8], [32, 64])
SIZES = {"intermediate_size": 192}


def make_study(path, family="llama", granularity="linear", choices=CHOICES, tokens=TOKENS, quantizer="rtn"):
    model = tiny_model(family, path, sizes=SIZES if family == "llama" else None)
    linears = list_linears(model)
    return Study(model, linears, make_units(linears, granularity, choices, span=64), tokens, quantizer)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study") / "model")


@pytest.fixture(scope="module")
def tables(study):
    """Losses of every method that a model without experts allows."""
    return {name: method.run(study) for name, method in METHODS.items() if name != "router"}


def choice(study, unit, bits, size=64):
    return next(i for i, c in enumerate(study.units[unit].choices) if (c.bits, c.group_size) == (bits, size))


def inputs_of(study, name):
    """What one linear reads, [tokens, K] fp64."""
    seen = []
    handle = study.model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        study.model(input_ids=TOKENS)
    handle.remove()
    return torch.cat(seen).reshape(-1, seen[0].shape[-1]).double()


def test_every_method_gives_losses_that_fall_from_two_bits_to_eight(study, tables):
    for name, table in tables.items():
        assert [len(row) for row in table] == [len(unit.choices) for unit in study.units], name
        for unit, row in enumerate(table):
            assert all(0 <= value < float("inf") for value in row), name
            assert row[choice(study, unit, 8)] < row[choice(study, unit, 2)], name


def test_methods_leave_the_model_as_it_was(study, tables):
    for spec in study.linears:
        if not spec.is_head:
            assert torch.equal(weight_view(study.model, spec), study.dense[spec.name])
    assert all(parameter.requires_grad for parameter in study.model.parameters())
    hooks = [h for m in study.model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any(hook.__module__.startswith("mpq_kernels") for hook in hooks)
    assert study.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("unit", [0, 6])
def test_hessian_is_the_mean_squared_change_of_the_outputs(study, tables, unit):
    cell, place = study.units[unit].cells[0], choice(study, unit, 3)
    error = study.error(cell, study.units[unit].choices[place]).double()
    change = (inputs_of(study, cell.spec.name) @ error.T).square().sum(1).mean()
    assert tables["hessian"][unit][place] == pytest.approx(float(change), rel=1e-4)  # fp32 sums over 192 tokens
    assert tables["frobenius"][unit][place] == pytest.approx(float(error.square().sum()), rel=1e-5)


def test_fisher_predicts_the_measured_divergence_of_small_changes(study, tables):
    ratios = []
    for index, unit in enumerate(study.units):
        if unit.name.endswith(("q_proj", "k_proj")):
            continue  # random weights attend to everything alike, and what is measured is the rounding of fp32
        place = choice(study, index, 4)
        with study.with_unit(unit, unit.choices[place]):
            ratios.append(study.kl() / tables["fisher"][index][place])
    # Inputs and gradients are not independent and 192 labels were drawn: within a factor of 3, and 1.5 in the middle.
    assert all(1 / 3 < ratio < 3 for ratio in ratios) and 1 / 1.5 < sorted(ratios)[len(ratios) // 2] < 1.5


def test_gradients_are_those_of_the_summed_loss_over_drawn_labels(study):
    name = "model.layers.1.mlp.down_proj"
    found = [output_gradients(study.model, TOKENS, [name], seed)[name] for seed in range(3)]
    assert found[0].shape == (64,) and bool((found[0] > 0).all())
    assert torch.allclose(found[0], found[1], rtol=1.0) and not torch.equal(found[0], found[1])


def test_baq_at_three_bits_is_the_loss_that_gptq_reports(study, tables):
    unit = 4
    cell, place = study.units[unit].cells[0], choice(study, unit, 3)
    hessian = damped(study.inputs.moments[cell.spec.name].clone(), DAMPING).double()
    plan = Plan.uniform(study.linears, 3, 64)
    member = next(w.members[0] for w in resolve(plan, study.linears).weights if w.name == cell.spec.name)
    weight = study.dense[cell.spec.name]
    error = (dequantize(quantize_weight(weight, member.layout, None, "gptq", "w", hessian)) - weight).double()
    expected = float(((error @ hessian) * error).sum())
    assert tables["baq"][unit][place] == pytest.approx(expected, rel=1e-4)
    assert tables["baq"][unit][choice(study, unit, 1)] == pytest.approx(16 * expected, rel=1e-4)


def test_gptq_loses_less_than_rounding(study, tables):
    total = {name: sum(row[choice(study, u, 3)] for u, row in enumerate(tables[name])) for name in ("gptq", "hessian")}
    assert total["gptq"] < total["hessian"]


@torch.no_grad()
def test_lim_weighs_layers_by_how_much_they_turn_their_input(study, tables):
    out = study.model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    first = torch.nn.functional.cosine_similarity(out[0], out[1], dim=-1).mean()
    assert layer_cosines(study.model, TOKENS)[0] == pytest.approx(float(first), rel=1e-5)
    place = choice(study, 0, 3)
    error = study.error(study.units[0].cells[0], study.units[0].choices[place]).square().sum()
    weight = study.dense[study.units[0].name]
    relative = float(error / weight.square().sum()) * weight.numel()
    assert tables["lim"][0][place] == pytest.approx((1 - float(first)) * relative, rel=1e-4)


def test_entropy_of_clusters_by_hand():
    """Four places that hold 1/2, 1/4, 1/8, 1/8 of the points: 7/4 bits; fewer clusters than places join the closest."""
    places = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 900.0], [0.0, 901.0]])
    points = places.repeat_interleave(torch.tensor([8, 4, 2, 2]), 0)
    for clusters in (4, 100):
        assert cluster_entropy(points, clusters) == pytest.approx(1.75 * math.log(2))
    assert cluster_entropy(points, 3) == pytest.approx(1.5 * math.log(2))
    assert cluster_entropy(points[:8], 4) == 0


@torch.no_grad()
def test_entropy_weighs_layers_by_their_outputs(study, tables):
    out = study.model.model(input_ids=TOKENS, output_hidden_states=True).hidden_states[1]
    place = choice(study, 0, 3)
    error = study.error(study.units[0].cells[0], study.units[0].choices[place]).square().sum()
    weight = study.dense[study.units[0].name]
    relative = float(error / weight.square().sum()) * weight.numel()
    entropy = cluster_entropy(out.flatten(0, 1), CLUSTERS)
    assert 1 < entropy <= math.log(CLUSTERS)
    assert tables["entropy"][0][place] == pytest.approx(entropy * relative, rel=1e-4)


def test_relevance_is_how_the_logit_follows_the_outputs(study, tables):
    """One token: y dz/dy is what z changes by when all of y grows, which is measured here."""
    token = TOKENS[:1, :1]
    names = [spec.name for spec in study.linears if not spec.is_head]
    found = output_relevance(study.model, token, names)
    assert sum(found.values()) == pytest.approx(1)
    slopes = {}
    with torch.no_grad():
        predicted = int(study.model(input_ids=token).logits[0, 0].argmax())
        for name in names[4:7]:
            logits = []
            for factor in (1.01, 0.99):
                handle = study.model.get_submodule(name).register_forward_hook(lambda m, a, out, f=factor: out * f)
                logits.append(float(study.model(input_ids=token).logits[0, 0, predicted].double()))
                handle.remove()
            slopes[name] = abs(logits[0] - logits[1]) / 0.02
    first = names[4]
    for name in names[5:7]:
        assert found[name] / found[first] == pytest.approx(slopes[name] / slopes[first], rel=0.01)


def test_zd_is_smaller_where_the_tail_is_longer(tmp_path):
    study = make_study(tmp_path / "m", choices=make_choices([3], [64]))
    weight = study.dense["model.layers.0.mlp.up_proj"]
    z = (weight - weight.mean()) / weight.std()
    part = float((z > 1).float().mean())
    unit = next(i for i, u in enumerate(study.units) if u.name == "model.layers.0.mlp.up_proj")
    error = study.error(study.units[unit].cells[0], study.units[unit].choices[0]).square().sum()
    expected = float(error / weight.square().sum()) * weight.numel() / part
    assert METHODS["zd"].run(study)[unit][0] == pytest.approx(expected, rel=1e-4)


def test_what_losses_are_measured_against_is_the_dense_model_whenever_it_is_first_asked_for(tmp_path):
    late, early = (make_study(tmp_path / name) for name in ("a", "b"))
    moments = early.inputs.moments
    unit = late.units[4]
    with late.with_unit(unit, unit.choices[0]):
        kl = late.kl()
        assert torch.equal(late.original.logp, early.original.logp) and kl > 1e-6
        assert all(torch.equal(late.inputs.moments[name], moments[name]) for name in moments)
        assert late.kl() == kl  # the unit is still quantized


def test_measured_is_the_divergence_with_one_unit_quantized(study, tables):
    unit, place = study.units[2], probes(study.units[2])[0]
    with study.with_unit(unit, unit.choices[place]):
        assert tables["measured"][2][place] == pytest.approx(study.kl(), rel=1e-5)


def test_a_plan_in_the_model_computes_what_its_packed_weights_do(study):
    units = study.units
    losses = METHODS["frobenius"].run(study)
    plans = (allocate(study.linears, units, losses, Budget("bits", 3 + i / 40)) for i in range(40))
    got = next(plan for plan in plans if plan.splits)  # so that a linear of two row bands is among them
    packed = copy.deepcopy(study.model)
    replace_linears(packed, got.plan, "rtn")
    with torch.no_grad(), study.with_plan(got.plan):
        expected = study.model(input_ids=TOKENS).logits
    with torch.no_grad():
        # The CPU kernels add in another order: fp32 over 192 columns and two layers.
        assert torch.allclose(packed(input_ids=TOKENS).logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("granularity", ["layer", "fuse", "column", "row"])
def test_losses_of_larger_and_smaller_units_add_up_to_those_of_linears(study, tables, granularity):
    other = make_study_like(study, granularity)
    table = METHODS["hessian"].run(other)
    place = {u: next(i for i, c in enumerate(unit.choices) if (c.bits, c.group_size) == (3, 32)) for u, unit in
             enumerate(other.units)}  # fmt: skip
    total = sum(table[u][i] for u, i in place.items())
    expected = sum(row[choice(study, u, 3, 32)] for u, row in enumerate(tables["hessian"]))
    # Columns of one linear err together, which pieces apart do not see; rows and whole linears are exact.
    assert total == pytest.approx(expected, rel=0.3 if granularity == "column" else 1e-4)


def make_study_like(study, granularity):
    units = make_units(study.linears, granularity, CHOICES, span=64)
    return Study(study.model, study.linears, units, TOKENS, "rtn")


def test_refining_keeps_the_best_measured_plan(study, tables):
    def solve(losses):
        return allocate(study.linears, study.units, losses, Budget("bits", 3.0))

    best, kls = refine(study, tables["zd"], solve, rounds=2)
    with study.with_plan(best.plan):
        assert study.kl() == pytest.approx(min(kls), rel=1e-5)
    assert len(kls) == 3 and best.bytes <= 3.0 * best.weights / 8


def test_what_a_method_needs_is_asked_for(tmp_path, study):
    blind = make_study(tmp_path / "m", tokens=None)
    for method in METHODS.values():
        if method.needs_text:
            with pytest.raises(PlanError, match="calibration text"):
                method.run(blind)
        else:
            assert method.run(blind)
    with pytest.raises(UnsupportedError, match="no experts"):
        METHODS["router"].run(study)
    with pytest.raises(PlanError, match="choose one of frobenius"):
        check_method("hesian")


def test_experts_are_counted_by_the_router(tmp_path):
    study = make_study(tmp_path / "moe", "mixtral", "expert", make_choices([1, 2, 3], [32]))
    inputs = study.inputs
    specs = [spec for spec in study.linears if spec.expert is not None and spec.expert.part == "gate"]
    names = [spec.name for spec in specs if spec.expert.module == specs[0].expert.module]
    assert sum(inputs.share[name] for name in names) == pytest.approx(2)  # two experts a token
    table = METHODS["router"].run(study)
    assert all(row == sorted(row, reverse=True) for row in table)
    with pytest.raises(UnsupportedError, match="fisher"):
        METHODS["fisher"].run(study)
    losses = METHODS["measured"].run(study)
    got = allocate(study.linears, study.units, losses, Budget("bits", 3.2))
    experts = [u for u in study.units if u.name.split(".")[-1].isdigit()]
    assert len(experts) == 6 and got.bytes <= 3.2 * got.weights / 8


def test_the_inputs_of_an_experts_down_projection_are_those_it_reads(tmp_path):
    study = make_study(tmp_path / "moe", "mixtral", "expert", make_choices([3], [32]))
    spec = next(s for s in study.linears if s.expert is not None and s.expert.part == "down")
    block = study.model.get_submodule(spec.expert.module)
    seen = []
    handle = block.register_forward_pre_hook(lambda m, args: seen.append(args[:3]))
    with torch.no_grad():
        study.model(input_ids=TOKENS)
    handle.remove()
    hidden, index, gate = seen[0]
    token, place = torch.where(index == spec.expert.index)
    merged = block.gate_up_proj[spec.expert.index]
    half = merged.shape[0] // 2
    x = block.act_fn(hidden[token] @ merged[:half].T) * (hidden[token] @ merged[half:].T) * gate[token, place, None]
    assert torch.allclose(study.inputs.moments[spec.name], x.T @ x / TOKENS.numel(), atol=1e-6, rtol=1e-3)
