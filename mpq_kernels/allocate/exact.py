"""The knapsack solved exactly, to a stated gap, by HiGHS (https://highs.dev, MIT) through its own package highspy."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from ..errors import PlanError, UnsupportedError
from .knapsack import Knapsack

GAP = 1e-6  # relative distance to the bound at which HiGHS may stop
TRIES = 8


def solve_exact(problem: Knapsack, seconds: float = 60.0) -> tuple[int, ...]:
    """A choice for each unit of least total loss. seconds: time limit.

    Raises UnsupportedError without highspy or when the time is up, PlanError when no choice keeps all constraints.
    """
    try:
        highspy: Any = importlib.import_module("highspy")
    except ImportError as error:
        raise UnsupportedError(
            f"the exact solver needs HiGHS ({error}): pip install 'mpq_kernels[allocate]', or choose solver='fast'"
        ) from None
    budget = problem.budget
    for _ in range(TRIES):
        picks = _solve(highspy, problem, budget, seconds)
        over = problem.cost_of(picks) - problem.budget
        if over <= 0:
            return picks
        # HiGHS keeps a row within a tolerance of 1e-6 of its scale; a budget is a promise, so ask for that much less.
        budget -= 2 * over
    raise UnsupportedError("HiGHS did not keep the budget within its tolerance; choose solver='fast'")


def _solve(highspy: Any, problem: Knapsack, budget: float, seconds: float) -> tuple[int, ...]:
    """One run. Columns are the choices of unit 0, then of unit 1, and so on; row 0 is the budget."""
    counts = [len(cost) for cost in problem.costs]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    units, columns, rules = len(counts), int(starts[-1]), len(problem.at_least)
    cost, loss = np.concatenate(problem.costs), np.concatenate(problem.losses)
    scale = max(1.0, float(np.abs(cost).max()))
    spread = float(loss.max() - loss.min()) or 1.0
    rows: list[list[tuple[int, float]]] = [[(0, cost[j] / scale)] for j in range(columns)]
    for unit in range(units):
        for j in range(starts[unit], starts[unit + 1]):
            rows[j].append((1 + unit, 1.0))
    for index, rule in enumerate(problem.at_least):
        for unit, choices in rule.choices.items():
            for choice in choices:
                rows[starts[unit] + choice].append((1 + units + index, 1.0))
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = columns, 1 + units + rules
    lp.col_cost_ = (loss - loss.min()) / spread
    lp.col_lower_, lp.col_upper_ = np.zeros(columns), np.ones(columns)
    counted = np.array([float(rule.count) for rule in problem.at_least])
    lp.row_lower_ = np.concatenate([[-highspy.kHighsInf], np.ones(units), counted])
    lp.row_upper_ = np.concatenate([[budget / scale], np.ones(units), np.full(rules, highspy.kHighsInf)])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int32)
    lp.a_matrix_.index_ = np.array([i for r in rows for i, _ in r], dtype=np.int32)
    lp.a_matrix_.value_ = np.array([v for r in rows for _, v in r], dtype=np.float64)
    lp.integrality_ = [highspy.HighsVarType.kInteger] * columns
    solver = highspy.Highs()
    for option, value in (("output_flag", False), ("mip_rel_gap", GAP), ("time_limit", seconds), ("threads", 1)):
        solver.setOptionValue(option, value)
    solver.passModel(lp)
    solver.run()
    status = solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        names = ", ".join(rule.name for rule in problem.at_least)
        raise PlanError(f"no choice keeps the budget of {problem.budget:,.6g} and all of: {names}")
    if status != highspy.HighsModelStatus.kOptimal:
        raise UnsupportedError(
            f"HiGHS stopped after {seconds:g} s without an optimum ({solver.modelStatusToString(status)}); give "
            "it more time, or choose solver='fast'"
        )
    values = np.asarray(solver.getSolution().col_value)
    return tuple(int(values[a:b].argmax()) for a, b in zip(starts[:-1], starts[1:], strict=True))
