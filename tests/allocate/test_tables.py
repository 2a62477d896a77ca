"""The tables of methods and solvers: every row is complete, works, and stands in docs/allocation.md."""

from pathlib import Path

import numpy as np
import pytest

from mpq_kernels.allocate import SOLVERS
from mpq_kernels.allocate.knapsack import Knapsack
from mpq_kernels.allocate.methods import METHODS

PAGE = (Path(__file__).parents[2] / "docs" / "allocation.md").read_text()


def section(title):
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_complete_and_documented(name):
    row = METHODS[name]
    assert row.name == name and row.summary and row.cost and row.source.startswith("https://")
    first_cells = [line.split("|")[1] for line in section("Methods").splitlines() if line.startswith("|")]
    assert sum(f"`{name}`" in cell for cell in first_cells) == 1, "docs/allocation.md has one line for every method"


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_keeps_the_budget_and_is_documented(name):
    if name == "exact":
        pytest.importorskip("highspy")
    assert f"`{name}`" in section("Solvers")
    rng = np.random.default_rng(0)
    for _ in range(5):
        costs = np.sort(rng.uniform(1, 9, (6, 4)), axis=1)
        losses = np.sort(rng.uniform(0, 1, (6, 4)), axis=1)[:, ::-1]
        problem = Knapsack.of(list(costs), list(losses), costs.min(1).sum() + 8)
        picks = SOLVERS[name](problem)
        assert len(picks) == 6 and problem.holds(picks)
        assert problem.loss_of(picks) <= problem.loss_of((0,) * 6), "worse than the cheapest choice of every unit"
