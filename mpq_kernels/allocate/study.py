"""What importance methods look at: a dense model in memory, its units, what each choice makes of a weight, and tokens.

A quantized weight is tried by writing its dequantized values over the dense ones, which gives what the packed layer
computes without packing anything; candidates are kept, so that trying one again is a copy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from ..dense.linears import LinearSpec
from ..errors import PlanError
from ..evaluate.divergence import Predictions, divergence, predict
from ..format.reference import dequantize
from ..format.weights import QuantizedWeight
from ..plan.plan import Plan
from ..plan.resolve import resolve
from ..progress import Progress
from ..quantize import BlockSpec, quantize_block, quantize_weight
from .inputs import Inputs, collect_inputs
from .units import Cell, Choice, Unit, allocated

CACHE_BYTES = 4 << 30  # of dequantized candidates
TOP_K = 2048  # log-probabilities of a token that measured losses compare


class Study:
    """A dense model whose units are looked at. The model's weights are changed while it runs, and always put back.

    model: in fp32 and eval mode. linears: all of it, from `list_linears`. tokens: int64 [windows, window], or None for
    methods that need no text. quantizer: one that needs no calibration; every candidate is made by it.
    """

    def __init__(
        self,
        model: Any,
        linears: Sequence[LinearSpec],
        units: Sequence[Unit],
        tokens: torch.Tensor | None = None,
        quantizer: str = "hqq",
        progress: Progress | None = None,
    ) -> None:
        self.model, self.linears, self.units = model, tuple(linears), tuple(units)
        self.quantizer, self._tokens, self.progress = quantizer, tokens, progress
        self.dense = {spec.name: weight_view(model, spec).clone() for spec in allocated(self.linears)}
        self._cache: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()
        self._cached = 0

    @property
    def tokens(self) -> torch.Tensor:
        """Calibration tokens. Raises PlanError without any."""
        if self._tokens is None:
            raise PlanError("this method looks at activations, so it needs a calibration text (--calibration FILE)")
        return self._tokens

    @cached_property
    def inputs(self) -> Inputs:
        """Second moments and extremes of what the linears read, of one pass over the tokens."""
        with self.all_dense():
            return collect_inputs(self.model, self.tokens, allocated(self.linears))

    @cached_property
    def original(self) -> Predictions:
        """What the dense model predicts on the tokens."""
        with self.all_dense():
            return predict(self.model, self.tokens, TOP_K)

    def weight(self, cell: Cell) -> torch.Tensor:
        """Dense weights of a cell, fp32."""
        return self.dense[cell.spec.name][cell.n0 : cell.n1, cell.k0 : cell.k1]

    def candidate(self, cell: Cell, choice: Choice) -> torch.Tensor:
        """What a cell's weights become under a choice: fp32 [rows, cols]."""
        if choice.kept:
            return self.weight(cell)
        whole = choice.group_size == -1 or cell.k0 % choice.group_size != 0
        k0, k1 = (cell.k0, cell.k1) if whole else (0, cell.spec.in_features)
        if (k1 - k0) % (choice.group_size if choice.group_size > 0 else 1):
            k0, k1 = cell.k0, cell.k1
        key = (cell.spec.name, choice, k0, k1)
        if key not in self._cache:
            spec = BlockSpec(choice.bits, choice.group_size, choice.zero)
            weight = self.dense[cell.spec.name][:, k0:k1].float()
            block = quantize_block(weight, spec, self.quantizer, cell.spec.name)
            self._keep(key, dequantize(QuantizedWeight.uniform(block)))
        self._cache.move_to_end(key)
        return self._cache[key][cell.n0 : cell.n1, cell.k0 - k0 : cell.k1 - k0]

    def error(self, cell: Cell, choice: Choice) -> torch.Tensor:
        """Candidate minus dense weights, fp32 [rows, cols]."""
        return self.candidate(cell, choice) - self.weight(cell).float()

    def table(self, loss: Callable[[Cell, torch.Tensor], float], what: str) -> list[list[float]]:
        """Losses of every unit and choice: the sum of loss(cell, error) over the cells; 0 for kept ones."""
        out = []
        for index, unit in enumerate(self.units):
            row = [0.0] * len(unit.choices)
            for place, choice in enumerate(unit.choices):
                if not choice.kept:
                    row[place] = sum(loss(cell, self.error(cell, choice)) for cell in unit.cells)
            out.append(row)
            self.report(index + 1, what)
        return out

    def report(self, done: int, what: str) -> None:
        """Tell how many units are done."""
        if self.progress is not None:
            self.progress(done, len(self.units), what)

    @torch.no_grad()
    def write(self, unit: Unit, choice: Choice) -> None:
        """Give the model's weights of a unit the values of a choice."""
        for cell in unit.cells:
            view = weight_view(self.model, cell.spec)[cell.n0 : cell.n1, cell.k0 : cell.k1]
            view.copy_(self.candidate(cell, choice))

    @torch.no_grad()
    def restore(self, names: Sequence[str] | None = None) -> None:
        """Put the dense weights back, all or those of some linears."""
        for spec in allocated(self.linears):
            if names is None or spec.name in names:
                weight_view(self.model, spec).copy_(self.dense[spec.name])

    @contextmanager
    def all_dense(self) -> Iterator[None]:
        """The dense model, whatever is tried at present, which is put back."""
        views = [weight_view(self.model, spec) for spec in allocated(self.linears)]
        before = [view.clone() for view in views]
        self.restore()
        try:
            yield
        finally:
            with torch.no_grad():
                for view, weight in zip(views, before, strict=True):
                    view.copy_(weight)

    @contextmanager
    def with_unit(self, unit: Unit, choice: Choice) -> Iterator[None]:
        """The model with one unit under a choice."""
        before = [weight_view(self.model, cell.spec).clone() for cell in unit.cells]
        self.write(unit, choice)
        try:
            yield
        finally:
            with torch.no_grad():
                for cell, weight in zip(unit.cells, before, strict=True):
                    weight_view(self.model, cell.spec).copy_(weight)

    @contextmanager
    def with_plan(self, plan: Plan) -> Iterator[None]:
        """The model under a plan: the very values that its packed weights would have."""
        for weight in resolve(plan, self.linears).weights:
            for member in weight.members:
                spec, view = member.spec, weight_view(self.model, member.spec)
                for s in member.layout.segments if member.perm is None else ():
                    zero = s.zero
                    cell = Cell(spec, s.n0, s.n1, s.k0, s.k1)
                    size = -1 if s.group_size == s.cols and s.cols == spec.in_features else s.group_size
                    with torch.no_grad():
                        view[s.n0 : s.n1, s.k0 : s.k1] = self.candidate(cell, Choice(s.bits, size, zero))
                if member.perm is not None:
                    perm = torch.tensor(member.perm, dtype=torch.int32)
                    found = quantize_weight(self.dense[spec.name], member.layout, perm, self.quantizer, spec.name)
                    with torch.no_grad():
                        view.copy_(dequantize(found))
        try:
            yield
        finally:
            self.restore()

    def kl(self) -> float:
        """KL of the model as it now is to the dense one, on the tokens: nats a token."""
        return divergence(self.model, self.original).kl

    def _keep(self, key: tuple[Any, ...], values: torch.Tensor) -> None:
        self._cache[key] = values
        self._cached += values.numel() * values.element_size()
        while self._cached > CACHE_BYTES and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            self._cached -= old.numel() * old.element_size()


def weight_view(model: Any, spec: LinearSpec) -> torch.Tensor:
    """The weight [N, K] of a linear or of an expert's linear, as a view of the model's parameter."""
    parameter: torch.Tensor = model.get_parameter(spec.tensor).data
    cut = None if spec.expert is None else spec.expert.cut
    if cut is None:
        return parameter.T if spec.transposed else parameter
    matrix = parameter[cut.index].T if cut.transposed else parameter[cut.index]
    return matrix[cut.start : cut.stop : cut.step]
