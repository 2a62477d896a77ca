"""A walk before the walk: what a calibration would refuse is refused before anything is quantized.

The model is walked once in full, on a few tokens and without its weights: linears and experts answer with zeros of the
right shape, every other parameter is one zero in the shape of many. So all of the model's own code runs, for any model
in about a second, and what it shows is what no weight can change: whether the model runs on tokens alone, which blocks
it calls and in which order, which linears it reaches. Where a model cannot take the zeros, it is walked with its
weights, which reads them once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..dense.checkpoint import DenseCheckpoint
from ..dense.experts import experts_modules
from ..dense.kinds import is_linear, linear_shape
from ..dense.model import build_meta_model
from ..plan.resolve import ResolvedPlan
from .calibration import Calibration
from .hessians import Calibrator
from .load import compute_buffers
from .walk import ModelFails

TOKENS = 8
Sample = Mapping[str, torch.Tensor]


class Skeleton:
    """A model of zeros that takes no memory. Raises CheckpointError: no model can be built."""

    def __init__(self, source: DenseCheckpoint) -> None:
        self.model: Any = build_meta_model(source.path, source.dtype)
        compute_buffers(self.model, torch.device("cpu"))
        for module in list(self.model.modules()):
            for key, parameter in list(module.named_parameters(recurse=False)):
                zeros = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                setattr(module, key, nn.Parameter(zeros, requires_grad=False))
            if is_linear(module):
                module.forward = _zeros_of(linear_shape(module)[0])
        for experts in experts_modules(self.model).values():
            experts.forward = lambda hidden_states, *args, **kwargs: torch.zeros_like(hidden_states)

    def load(self, stage: int) -> None:
        """Everything is there."""


def _zeros_of(size: int) -> Any:
    return lambda x: x.new_zeros(*x.shape[:-1], size)


def check_walk(source: DenseCheckpoint, resolved: ResolvedPlan, sample: Sample | None = None) -> None:
    """Raise what a calibration of this plan, in its order, would raise, as far as it does not hang on values.

    sample: one of those that it reads, None where it reads tokens.

    QuantizeError: a model that cannot be walked, a linear that no token reaches; CheckpointError.
    """
    if not resolved.weights:
        return
    try:
        _walk(source, resolved, sample, Skeleton(source))
    except ModelFails:
        _walk(source, resolved, sample, None)


def _walk(source: DenseCheckpoint, resolved: ResolvedPlan, sample: Sample | None, skeleton: Skeleton | None) -> None:
    tokens = torch.ones(1, TOKENS, dtype=torch.int64)
    calibration = Calibration(tokens=tokens) if sample is None else Calibration(samples=[sample])
    calibrator = Calibrator(source, calibration, skeleton)
    for weight in resolved.weights:
        for member in weight.members if weight.embedding is None else ():
            calibrator.check(member.spec.name)
