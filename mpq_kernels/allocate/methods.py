"""Importance methods: how much is lost when a unit is stored in a certain way. `METHODS` is the table.

    method(study) -> losses: for every unit of study.units, a loss for each of its choices

A method that ranks layers or linears and says nothing about widths gives an importance a >= 0, and the loss is

    a * weights of the linear * ||Q - W||^2 / ||W||^2        (linear in the relative error: Q-Palette, arXiv 2509.20214)

so that equal importances give equal widths. Where the source only sorts, that product is this package's reading of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..calibrate.hessians import damped
from ..dense.linears import LinearSpec
from ..errors import PlanError, UnsupportedError
from ..format.layout import WeightLayout
from ..format.reference import dequantize
from ..quantize.gptq import inverse_factor, quantize_with_hessian
from .inputs import attention_received, collect_inputs, layer_cosines
from .measured import greedy_losses, measured_losses
from .predicted import Table, fisher_losses, hessian_losses, moment, output_error
from .scores import layer_entropies, output_relevance
from .study import Study
from .units import NUMBER, Cell, Choice, allocated

DAMPING = 0.05
BASE_BITS = 3  # at which GPTQ's column losses are measured


@dataclass(frozen=True)
class Method:
    """run: (study) -> losses. needs_text: whether it runs the model on calibration tokens. cost: in words.

    embeddings: whether units may be embeddings, which have no inputs to look at.
    """

    name: str
    run: Callable[[Study], Table]
    needs_text: bool
    cost: str
    summary: str
    source: str
    embeddings: bool = False


def weighed(study: Study, importance: Mapping[str, float], what: str) -> Table:
    """Losses from an importance of every linear; see the module's text. Raises PlanError for a negative one."""
    for name, value in importance.items():
        if not 0 <= value < float("inf"):
            raise PlanError(f"{name}: its importance of {value!r} ({what}) is not a finite number >= 0")
    norms = {name: float(w.float().square().sum(dtype=torch.float64)) for name, w in study.dense.items()}

    def loss(cell: Cell, error: torch.Tensor) -> float:
        name = cell.spec.name
        size = study.dense[name].numel()
        return importance[name] * size * float(error.square().sum(dtype=torch.float64)) / max(norms[name], 1e-300)

    return study.table(loss, what)


def _weight_error(study: Study) -> Table:
    return study.table(lambda cell, error: float(error.square().sum(dtype=torch.float64)), "weight error")


def _trace(study: Study) -> Table:
    traces = {name: float(m.diagonal().mean()) for name, m in study.inputs.moments.items()}

    def loss(cell: Cell, error: torch.Tensor) -> float:
        return traces[cell.spec.name] * float(error.square().sum(dtype=torch.float64))

    return study.table(loss, "trace")


def _attention(study: Study) -> Table:
    weights = attention_received(study.model, study.tokens)
    moments = collect_inputs(study.model, study.tokens, allocated(study.linears), weights).moments
    return study.table(lambda cell, error: output_error(error, moment(moments, cell)), "attended output error")


def _gptq(study: Study) -> Table:
    """GPTQ's own loss of every choice: output error after its corrections."""
    moments = {name: _damped(m) for name, m in study.inputs.moments.items()}
    table = []
    for index, unit in enumerate(study.units):
        row = []
        for choice in unit.choices:
            total = 0.0
            for cell in unit.cells if not choice.kept else ():
                weight = study.weight(cell).float()
                hessian = moment(moments, cell).double()
                found = quantize_with_hessian(weight, _layout(cell, choice), None, hessian, cell.spec.name)
                total += output_error(dequantize(found) - weight, moment(study.inputs.moments, cell))
            row.append(total)
        table.append(row)
        study.report(index + 1, "gptq")
    return table


def _baq(study: Study) -> Table:
    """Column losses of one GPTQ pass at BASE_BITS, and 2**-2b from there: BAQ's closed form."""
    table: Table = [[0.0] * len(unit.choices) for unit in study.units]
    columns: dict[tuple[str, int], torch.Tensor] = {}
    for index, unit in enumerate(study.units):
        for place, choice in enumerate(unit.choices):
            for cell in unit.cells if not choice.kept else ():
                key = (cell.spec.name, choice.group_size)
                if key not in columns:
                    columns[key] = _column_losses(study, cell.spec, choice.group_size)
                share = cell.rows / cell.spec.out_features
                base = float(columns[key][cell.k0 : cell.k1].sum())
                table[index][place] += share * base * 4.0 ** (BASE_BITS - choice.bits)
        study.report(index + 1, "baq")
    return table


def _column_losses(study: Study, spec: LinearSpec, group_size: int) -> torch.Tensor:
    """Sum over rows of ((w - q) / U_jj)^2 for each column j, before its error is handed on: fp64 [K]."""
    cell = Cell.whole(spec)
    hessian = _damped(study.inputs.moments[spec.name]).double()
    factor = inverse_factor(hessian, spec.in_features, None, spec.name).double()
    weight = study.weight(cell).float()
    found = quantize_with_hessian(weight, _layout(cell, Choice(BASE_BITS, group_size)), None, hessian, spec.name)
    # With R = W - Q and the corrections of GPTQ, column j was off by e_j U_jj when it was rounded, e = R U^-1.
    errors = torch.linalg.solve_triangular(factor, (weight - dequantize(found)).double(), upper=True, left=False)
    return errors.square().sum(0)


def _layout(cell: Cell, choice: Choice) -> WeightLayout:
    return WeightLayout.uniform(cell.rows, cell.cols, choice.bits, choice.group_size, choice.zero)


def _damped(moments: torch.Tensor) -> torch.Tensor:
    return damped(moments.clone(), DAMPING)


def _lim(study: Study) -> Table:
    cosines = layer_cosines(study.model, study.tokens)
    values = [1.0 - cosine for cosine in cosines]
    return weighed(study, _of_layers(study, values), "lim")


def _entropy(study: Study) -> Table:
    return weighed(study, _of_layers(study, layer_entropies(study.model, study.tokens)), "entropy")


def _relevance(study: Study) -> Table:
    specs = allocated(study.linears)
    if any(spec.expert is not None for spec in specs):
        raise UnsupportedError("relevance needs gradients of single linears, which experts do not have; choose hessian")
    return weighed(study, output_relevance(study.model, study.tokens, [spec.name for spec in specs]), "relevance")


def _of_layers(study: Study, values: list[float]) -> dict[str, float]:
    """The value of its layer for every linear; the mean of all for one outside of the layers."""
    order: dict[str, int] = {}
    out = {}
    for spec in allocated(study.linears):
        match = NUMBER.fullmatch(spec.name)
        if match is None:
            out[spec.name] = sum(values) / len(values)
        else:
            out[spec.name] = values[order.setdefault(match[1], len(order))]
    return out


def _zd(study: Study) -> Table:
    found = {}
    for name, weight in study.dense.items():
        w = weight.float()
        z = (w - w.mean()) / w.std()
        found[name] = 1.0 / max(float((z > 1).float().mean()), 1.0 / w.numel())
    return weighed(study, found, "zd")


def _weight_outliers(study: Study) -> Table:
    found = {}
    for name, weight in study.dense.items():
        w = weight.float().abs()
        found[name] = float((w.amax(0) / w.mean(0).clamp(min=1e-30)).max())
    return weighed(study, found, "weight outliers")


def _input_outliers(study: Study) -> Table:
    inputs = study.inputs
    found = {name: inputs.peak[name] / max(inputs.typical[name], 1e-30) for name in inputs.moments}
    return weighed(study, found, "input outliers")


def _router(study: Study) -> Table:
    """Experts: share of tokens * (mean gate weight)^1.5 * change of their output; other linears: output error."""
    inputs = study.inputs
    if not inputs.share:
        raise UnsupportedError("router statistics exist for mixture models only, and this model has no experts")
    moments = study.inputs.moments

    def loss(cell: Cell, error: torch.Tensor) -> float:
        name = cell.spec.name
        change = output_error(error, moment(moments, cell)) ** 0.5
        if name not in inputs.share:
            return change
        return inputs.share[name] * inputs.gate[name] ** 1.5 * change

    return study.table(loss, "router")


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method(
            "frobenius", _weight_error, False, "every candidate quantized once", "squared error of the weights",
            "https://arxiv.org/abs/1911.03852", embeddings=True,
        ),
        Method(
            "trace", _trace, True, "one pass", "squared error of the weights times the mean square of their inputs",
            "https://arxiv.org/abs/1911.03852",
        ),
        Method(
            "hessian", hessian_losses, True, "one pass", "squared error of the outputs, trace(E H E^T)",
            "https://arxiv.org/abs/2210.17323",
        ),
        Method(
            "attention", _attention, True, "two passes, eager attention", "hessian, tokens weighed by attention",
            "https://arxiv.org/abs/2503.01820",
        ),
        Method(
            "fisher", fisher_losses, True, "one pass and one backward", "output errors weighed by squared gradients",
            "https://arxiv.org/abs/1503.05671",
        ),
        Method(
            "gptq", _gptq, True, "one GPTQ run per choice", "output error that GPTQ leaves",
            "https://arxiv.org/abs/2210.17323",
        ),
        Method(
            "baq", _baq, True, "one GPTQ run per group size", "GPTQ's column losses at 3 bits, times 4^(3 - bits)",
            "https://arxiv.org/abs/2506.05664",
        ),
        Method(
            "lim", _lim, True, "one pass", "1 - cosine between input and output of a layer",
            "https://arxiv.org/abs/2406.17415",
        ),
        Method(
            "entropy", _entropy, True, "one pass, k-means of each layer's outputs",
            "entropy of a layer's outputs in 100 clusters", "https://arxiv.org/abs/2509.23729",
        ),
        Method(
            "relevance", _relevance, True, "one pass and one backward",
            "relevance (LRP) of a linear's outputs for the predicted token", "https://arxiv.org/abs/2401.11243",
        ),
        Method(
            "zd", _zd, False, "weights only", "1 / part of the weights more than one deviation above the mean",
            "https://arxiv.org/abs/2406.17415", embeddings=True,
        ),
        Method(
            "weight-outliers", _weight_outliers, False, "weights only", "largest max|w| / mean|w| of a column",
            "https://arxiv.org/abs/2406.08155", embeddings=True,
        ),
        Method(
            "input-outliers", _input_outliers, True, "one pass", "max|x| / mean|x| of a linear's input",
            "https://arxiv.org/abs/2405.14428",
        ),
        Method(
            "router", _router, True, "one pass", "experts: routed share * gate^1.5 * output change",
            "https://arxiv.org/abs/2410.06270",
        ),
        Method(
            "measured", measured_losses, True, "one pass per unit and probe", "KL with one unit quantized at a time",
            "https://arxiv.org/abs/2006.10518",
        ),
        Method(
            "greedy", greedy_losses, True, "one pass per unit and width step",
            "KL of each step down, taken from a model whose other units are already lowered",
            "https://arxiv.org/abs/2509.15455",
        ),
    )
}  # fmt: skip


def check_method(method: str) -> None:
    """Raise PlanError unless it is the name of one of the table's."""
    if method not in METHODS:
        raise PlanError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}")
