"""A dense model run block by block on a text, with bounded memory: Hessians, routed experts, learned rounding.

May import: plan, quantize, dense, files, format.
Gives: Calibration, what is read; hessians.Calibrator, x^T x of every linear; auto_round.LearnedRounding.
"""

from .calibration import Calibration

__all__ = ["Calibration"]
