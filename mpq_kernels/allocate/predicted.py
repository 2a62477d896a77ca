"""Losses predicted from second moments: the error of a linear's output, plain or weighed by what the output is worth.

hessian    trace(E H E^T),                 E = Q - W, H = mean of x x^T
fisher     1/2 sum_n g_n (E H E^T)_nn,     g_n = mean squared gradient of output n: the KL that E gives, to second
           order, if inputs and gradients are independent of each other, and so are outputs
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..errors import UnsupportedError
from .inputs import output_gradients
from .units import Cell, allocated

if TYPE_CHECKING:
    from .study import Study

Table = list[list[float]]  # of every unit, for each of its choices


def moment(moments: Mapping[str, torch.Tensor], cell: Cell) -> torch.Tensor:
    """The part of a linear's moments [K, K] that belongs to the columns of a cell."""
    return moments[cell.spec.name][cell.k0 : cell.k1, cell.k0 : cell.k1]


def output_error(error: torch.Tensor, moments: torch.Tensor) -> float:
    """Mean squared norm of error @ x over the inputs x of moments E[x x^T]: trace(error moments error^T)."""
    return float(((error @ moments) * error).sum(dtype=torch.float64).clamp(min=0))


def hessian_losses(study: Study) -> Table:
    """trace(E H E^T)."""
    moments = study.inputs.moments
    return study.table(lambda cell, error: output_error(error, moment(moments, cell)), "hessian")


def fisher_losses(study: Study) -> Table:
    """Predicted KL. Raises UnsupportedError for experts, which are no modules whose outputs could be watched."""
    specs = allocated(study.linears)
    if any(spec.expert is not None for spec in specs):
        raise UnsupportedError("fisher needs gradients of single linears, which experts do not have; choose hessian")
    moments = study.inputs.moments
    gradients = output_gradients(study.model, study.tokens, [spec.name for spec in specs])

    def loss(cell: Cell, error: torch.Tensor) -> float:
        rows = ((error @ moment(moments, cell)) * error).sum(1, dtype=torch.float64).clamp(min=0)
        return 0.5 * float(rows @ gradients[cell.spec.name][cell.n0 : cell.n1].double())

    return study.table(loss, "fisher")


def predicted_losses(study: Study) -> Table:
    """The best prediction that the model allows."""
    experts = any(spec.expert is not None for spec in allocated(study.linears))
    return hessian_losses(study) if experts else fisher_losses(study)
