"""Allocation: which width and group size every part of a model gets, for the least loss within a budget.

    linears --make_units--> units --METHODS[...]--> losses --allocate(budget)--> Plan

May import every room but cli. Gives: units, budgets and solvers; study.Study and methods.METHODS, what a width would
cost; sweep.py and chart.py, curves over budgets. Source: docs/allocation.md.
"""

from __future__ import annotations

from .budget import Budget
from .knapsack import AtLeast, Knapsack
from .latency import LatencyTable
from .solve import SOLVERS, Allocation, allocate, make_plan, plan_bytes
from .units import GRANULARITIES, Choice, Limits, Unit, make_choices, make_units

__all__ = [
    "GRANULARITIES",
    "SOLVERS",
    "Allocation",
    "AtLeast",
    "Budget",
    "Choice",
    "Knapsack",
    "LatencyTable",
    "Limits",
    "Unit",
    "allocate",
    "make_choices",
    "make_plan",
    "make_units",
    "plan_bytes",
]
