"""The two plans of tests/made/plans.py, for every command of `mpq plan`."""

from tests.made.plans import plan_space, run_plan  # noqa: F401  (fixtures)
