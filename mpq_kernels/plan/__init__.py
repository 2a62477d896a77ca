"""Plans: which width every linear gets, as a value and as a file; and a plan applied to the linears of a model.

May import: dense, files, format. Reads no weight.
Gives: Plan and its parts; resolve.resolve, plan and linears -> layouts; foreign.read_foreign, plans of other programs.
"""

from .plan import FusePlan, Plan, SegmentPlan, WeightPlan

__all__ = ["FusePlan", "Plan", "SegmentPlan", "WeightPlan"]
