"""Solvers against brute force and each other, budgets to the byte, units and their stored bytes."""

import itertools
import time

import numpy as np
import pytest

from mpq_kernels.allocate import (
    AtLeast,
    Budget,
    Choice,
    Knapsack,
    LatencyTable,
    Limits,
    allocate,
    make_choices,
    make_units,
    plan_bytes,
)
from mpq_kernels.allocate.exact import solve_exact
from mpq_kernels.allocate.fast import solve_fast
from mpq_kernels.allocate.knapsack import hull
from mpq_kernels.dense.linears import ExpertPart, LinearSpec
from mpq_kernels.errors import PlanError, UnsupportedError
from mpq_kernels.plan.resolve import resolve


def block(index, hidden=256, ffn=640, kv=128):
    """The linears of one decoder layer."""
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    return [LinearSpec(f"model.layers.{index}.{n}", *s, f"model.layers.{index}.{n}.weight") for n, s in shapes.items()]


def model(layers=2, **sizes):
    head = LinearSpec("lm_head", 512, sizes.get("hidden", 256), "lm_head.weight", is_head=True)
    return [spec for index in range(layers) for spec in block(index, **sizes)] + [head]


def instance(units, choices, seed, columns=4096):
    """Costs that grow with the width, losses that fall four-fold a bit, of units of very different weight."""
    rng = np.random.default_rng(seed)
    bits = np.linspace(1, 8, choices)
    rows = rng.choice([256, 1024, 4096, 14336], size=units)
    importance = rng.lognormal(0, 2, size=units)
    costs = [np.round(r * columns * bits / 8 * rng.uniform(0.95, 1.05, choices)) for r in rows]
    losses = [a * 4.0**-bits * rng.uniform(0.7, 1.4, choices) for a in importance]
    least, most = sum(c.min() for c in costs), sum(c.max() for c in costs)
    return Knapsack.of(costs, losses, least + rng.uniform(0.1, 0.6) * (most - least))


def brute(problem):
    picks = [p for p in itertools.product(*(range(len(c)) for c in problem.costs)) if problem.holds(p)]
    return min(problem.loss_of(p) for p in picks)


def falling(units, seed=0):
    """A loss for every choice that falls with its bytes."""
    rng = np.random.default_rng(seed)
    return [[rng.lognormal(0, 1) * u.weights * 4.0 ** (-8 * b / u.weights) for b in u.bytes] for u in units]


@pytest.mark.parametrize("seed", range(20))
def test_solvers_on_small_cases_against_every_combination(seed):
    pytest.importorskip("highspy")
    problem = instance(5, 4, seed)
    least = brute(problem)
    exact, fast = solve_exact(problem), solve_fast(problem)
    assert problem.holds(exact) and problem.holds(fast)
    assert problem.loss_of(exact) == pytest.approx(least, rel=1e-5)
    assert problem.loss_of(fast) == pytest.approx(least, rel=1e-9)  # so few units are all decided together


def test_costs_need_not_rise_with_the_width():
    pytest.importorskip("highspy")
    rng = np.random.default_rng(3)
    for _ in range(10):
        costs, losses = rng.uniform(1, 9, (5, 4)), np.sort(rng.uniform(0, 1, (5, 4)))[:, ::-1]
        problem = Knapsack.of(list(costs), list(losses), costs.min(1).sum() + 8)
        assert problem.loss_of(solve_exact(problem)) == pytest.approx(brute(problem), abs=1e-6)
        assert problem.cost_of(solve_fast(problem)) <= problem.budget


@pytest.mark.parametrize("seed", range(3))
def test_fast_is_within_a_thousandth_of_exact_in_two_seconds(seed):
    pytest.importorskip("highspy")
    problem = instance(300, 8, seed)
    start = time.process_time()
    fast = solve_fast(problem)
    seconds = time.process_time() - start
    assert problem.holds(fast)
    assert problem.loss_of(fast) <= 1.001 * problem.loss_of(solve_exact(problem))
    assert seconds < 2


def test_at_least_so_many_units_is_kept_by_the_exact_solver_and_refused_by_the_fast_one():
    pytest.importorskip("highspy")
    problem = instance(4, 3, 1)
    rule = AtLeast({u: frozenset({2}) for u in range(4)}, 1, "one of the widest")
    low = float(sum(c[0] for c in problem.costs) + max(c[2] - c[0] for c in problem.costs))
    bound = Knapsack.of(problem.costs, problem.losses, low, [rule])
    picks = solve_exact(bound)
    assert 2 in picks and bound.loss_of(picks) == pytest.approx(brute(bound), rel=1e-5)
    with pytest.raises(UnsupportedError, match="one of the widest"):
        solve_fast(bound)
    impossible = Knapsack.of(problem.costs, problem.losses, low, [AtLeast({0: frozenset({2})}, 2, "two of one")])
    with pytest.raises(PlanError, match="two of one"):
        solve_exact(impossible)


def test_hull_keeps_the_steps_of_falling_gain():
    cost, loss = np.array([1.0, 2, 3, 4, 2]), np.array([10.0, 9, 2, 1, 12])
    assert hull(cost, loss) == [0, 2, 3]  # 1 lies above the line from 0 to 2, 4 loses more than 0


@pytest.mark.parametrize(
    ("costs", "losses", "budget", "words"),
    [
        ([[2, 3]], [[1, 0]], 1, "below 2"),
        ([[2, 3]], [[1, float("nan")]], 5, "NaN or Inf"),
        ([[2, 3]], [[1]], 5, "do not pair up"),
        ([], [], 5, "at least one"),
    ],
)
def test_an_impossible_knapsack_is_refused(costs, losses, budget, words):
    with pytest.raises(PlanError, match=words):
        Knapsack.of(costs, losses, budget)


@pytest.mark.parametrize("granularity", ["layer", "linear", "fuse", "column", "row"])
def test_units_cover_every_weight_once_and_bytes_are_those_of_the_plan(granularity):
    linears = model(2, ffn=704, kv=96)
    units = make_units(linears, granularity, make_choices([1, 2, 3, 5, 8], [32, 64]))
    assert sum(u.weights for u in units) == sum(s.out_features * s.in_features for s in linears[:-1])
    losses = falling(units)
    got = allocate(linears, units, losses, Budget("bits", 3.1))
    resolved = resolve(got.plan, linears)
    assert resolved.size().total_bytes == got.bytes <= 3.1 * got.weights / 8
    assert list(resolved.kept) == ["lm_head"]


def test_units_of_a_layer_share_their_choice_and_fused_siblings_too():
    linears = model(2)
    choices = make_choices([2, 4, 16])
    names = [u.name for u in make_units(linears, "fuse", choices)]
    assert names[0] == "model.layers.0.self_attn.(q_proj|k_proj|v_proj)" and len(names) == 8
    units = make_units(linears, "layer", choices)
    assert [u.name for u in units] == ["model.layers.0", "model.layers.1"]
    assert units[0].bytes[-1] == 2 * units[0].weights  # kept
    got = allocate(linears, units, [[9, 8, 0], [8, 7, 0]], Budget("bytes", units[0].bytes[2] + units[1].bytes[0]))
    assert got.plan.modules["model.layers.0.mlp.up_proj"].bits == 16
    assert got.plan.modules["model.layers.1.mlp.up_proj"].bits == 2


def test_experts_are_units_and_cannot_be_kept():
    part = {i: ExpertPart("model.layers.0.mlp.experts", "model.layers.0.mlp.experts", i, 2, "gate") for i in range(2)}
    experts = [LinearSpec(f"model.layers.0.mlp.experts.{i}.gate_proj", 64, 64, "t", expert=part[i]) for i in range(2)]
    units = make_units(experts, "expert", make_choices([2, 16]))
    assert [u.name for u in units] == ["model.layers.0.mlp.experts.0", "model.layers.0.mlp.experts.1"]
    assert all(u.choices == (Choice(2),) for u in units)


@pytest.mark.parametrize("granularity", ["linear", "row"])
def test_fifty_random_budgets_are_met_within_a_row_of_supertiles_and_never_exceeded(granularity):
    linears = model(3, ffn=704, kv=96)
    units = make_units(linears, granularity, make_choices([1, 2, 3, 4, 6, 8], [64]))
    losses = [list(-np.sort(-np.array(row))) for row in falling(units, 1)]
    low, high = sum(min(u.bytes) for u in units), sum(max(u.bytes) for u in units)
    rng = np.random.default_rng(5)
    for budget in rng.integers(low, high, 50).tolist():
        got = allocate(linears, units, losses, Budget("bytes", budget))
        assert plan_bytes(got.plan, linears, 2) == got.bytes
        assert got.bytes <= budget
        # One more bit for 64 rows of the narrowest unit, and the scales do not change: 512 bytes a supertile; the
        # widest step between neighbouring widths here is two bits.
        assert budget - got.bytes < 2 * 512 * 704 // 64


def test_a_budget_beyond_the_widest_choice_takes_it_everywhere():
    linears = model(1)
    units = make_units(linears, "linear", make_choices([2, 8]))
    got = allocate(linears, units, falling(units), Budget("bits", 12))
    assert set(got.picks) == {1} and not got.splits


def test_an_error_budget_gives_the_fewest_bytes_that_reach_it():
    pytest.importorskip("highspy")
    linears = model(1)[:3]
    units = make_units(linears, "linear", make_choices([2, 3, 4]))
    losses = [[4.0, 2.0, 1.0], [8.0, 4.0, 2.0], [2.0, 1.0, 0.5]]
    got = allocate(linears, units, losses, Budget("error", 5.0), solver="exact")
    assert got.loss <= 5
    least = min(
        sum(u.bytes[p] for u, p in zip(units, picks, strict=True))
        for picks in itertools.product(range(3), repeat=3)
        if sum(row[p] for row, p in zip(losses, picks, strict=True)) <= 5
    )
    assert got.bytes == least


def table(entry=lambda n, k, bits: n * k * bits / 1e5):
    shapes = {(s.out_features, s.in_features) for s in model(1)}
    names = ("out_features", "in_features", "bits", "group_size", "us")
    return {
        "device": "test",
        "entries": [dict(zip(names, (n, k, b, 64, entry(n, k, b)), strict=True)) for n, k in shapes for b in (2, 3, 4)],
    }


def test_a_latency_budget_takes_the_wider_choice_where_it_is_faster():
    linears = model(1)
    units = make_units(linears, "linear", make_choices([2, 3, 4]))
    odd = LatencyTable.from_dict(table(lambda n, k, bits: n * k * (1.0 if bits == 3 else bits) / 1e5))
    total = sum(u.weights for u in units) / 1e5
    got = allocate(linears, units, falling(units), Budget("us", total), latency=odd)
    assert got.us == pytest.approx(total) and {units[0].choices[p].bits for p in got.picks} == {3}
    with pytest.raises(PlanError, match="needs a latency table"):
        allocate(linears, units, falling(units), Budget("us", total))
    with pytest.raises(PlanError, match="no entry for .*'bits': 8"):
        wide = make_units(linears, "linear", make_choices([2, 8]))
        allocate(linears, wide, falling(wide), Budget("us", 50), latency=odd)
    with pytest.raises(PlanError, match="part of a linear"):
        rows = make_units(linears, "row", make_choices([2, 3]))
        allocate(linears, rows, falling(rows), Budget("us", 50), latency=odd)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(entries=[]), "non-empty list"),
        (lambda d: d["entries"][0].update(us=-1), r"entries\[0\].*positive number"),
        (lambda d: d["entries"][1].pop("bits"), r"entries\[1\].*bits"),
        (lambda d: d["entries"].append(d["entries"][0]), "repeats"),
    ],
)
def test_a_bad_latency_table_is_refused(change, words, tmp_path):
    data = table()
    change(data)
    with pytest.raises(PlanError, match=words):
        LatencyTable.from_dict(data)


def test_limits_hold_and_unknown_ones_are_refused():
    linears = model(1)
    limits = Limits(least={r".*v_proj": 4}, most={r".*down_proj": 3})
    units = make_units(linears, "linear", make_choices([2, 3, 4]), limits=limits)
    widths = {u.name.rpartition(".")[2]: {c.bits for c in u.choices} for u in units}
    assert widths["v_proj"] == {4} and widths["down_proj"] == {2, 3} and widths["q_proj"] == {2, 3, 4}
    with pytest.raises(PlanError, match="matches none"):
        make_units(linears, "linear", make_choices([2]), limits=Limits(least={"w_proj": 2}))
    with pytest.raises(PlanError, match="none of 2g64 fits 4..16 bits"):
        make_units(linears, "linear", make_choices([2]), limits=limits)
    with pytest.raises(PlanError, match="group size that divides"):
        make_units(linears, "linear", make_choices([2], [96]))


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("2.5", "bits", 2.5),
        ("2.5bits", "bits", 2.5),
        ("1e6bytes", "bytes", 1e6),
        ("840us", "us", 840),
        ("1error", "error", 1),
    ],
)
def test_budgets_are_read(text, kind, value):
    assert Budget.parse(text) == Budget(kind, value)


@pytest.mark.parametrize("text", ["", "few", "-3bits", "nanbits", "0"])
def test_budgets_that_are_none_are_refused(text):
    with pytest.raises(PlanError):
        Budget.parse(text)
