"""`QUANTIZERS`: the table of methods. Help texts, messages and tests take names from it; docs are compared with it.

A row is what a method does with groups (`Steps`: a search of scale and zero, a rounding) and, where it has a use for a
text, how it goes over a weight with the Hessian of its inputs:

    on_text = search_with_hessian     every group for itself, judged by its part of the Hessian
    on_text = quantize_with_hessian   column by column, later columns making up for earlier errors
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import QuantizeError
from ..format.layout import WeightLayout
from ..format.weights import QuantizedBlock, QuantizedWeight
from .blocks import BlockSpec, Steps, quantize_groups
from .gptq import quantize_with_hessian
from .hqq import search_scale_and_zero
from .hqq_outputs import search_with_hessian
from .rtn import range_search

OnText = Callable[
    [torch.Tensor, WeightLayout, torch.Tensor | None, torch.Tensor, str, Steps],
    QuantizedWeight,
]
Alone = Callable[[torch.Tensor, BlockSpec, Steps], QuantizedBlock]

# What tests ask of every method; a row is exempt from one with a reason. Not here, because nothing is exempt: layouts
# as asked for, groups of zeros, segments, permutations, refusals.
PROPERTIES = {
    "nearest": "every code is the nearest one of its stored scale and zero",
    "exact on a grid": "weights on a grid of the width come back bit for bit",
    "one bit": "one symmetric bit is the sign, and twice the mean size",
    "far from zero": "float zeros reach a range away from 0",
    "not worse than rtn": "no group has a larger squared error than with rtn",
    "close": "4 bits in groups of 64 lose less than 2% of the squares of the weights",
    "better on a text": "given a text, the outputs are closer than with rtn, in groups of any length",
    "any threads": "the same codes for any number of threads and any size of the parts",
}


@dataclass(frozen=True)
class Quantizer:
    """A method. steps: None for one that is another library's (whole_model).

    alone: (finite weight [n, k], spec, steps) -> codes of a rectangle, without a text.
    on_text: (finite weight [N, K], layout, perm, Hessian, name, steps) -> codes; None for one that has no use for it.
    needs_calibration: it cannot do without a text. act_order: it may choose the order of the columns on it.
    for_embeddings: name of the method that quantizes embeddings, whose rows are looked up, so that they have no inputs
    and no Hessian; None for itself.
    whole_model: it sees all weights at once and is run by `pack` alone.
    exempt: names of PROPERTIES that it does not have -> the reason, with which its tests are skipped.
    """

    name: str
    summary: str
    steps: Steps | None
    alone: Alone = quantize_groups
    on_text: OnText | None = None
    needs_calibration: bool = False
    act_order: bool = False
    whole_model: bool = False
    for_embeddings: str | None = None
    exempt: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.exempt) - set(PROPERTIES)
        assert not unknown, f"{self.name}: {unknown} are none of {[*PROPERTIES]}"

    @property
    def takes_calibration(self) -> bool:
        """Whether it has a use for text."""
        return self.on_text is not None or self.whole_model


QUANTIZERS: dict[str, Quantizer] = {
    q.name: q
    for q in (
        Quantizer("rtn", "round to nearest, min/max range", Steps(range_search)),
        Quantizer(
            "hqq",
            "scale and zero of least squared error (on a text: of the outputs): clip grid and half-quadratic steps",
            Steps(search_scale_and_zero),
            on_text=search_with_hessian,
        ),
        Quantizer(
            "gptq",
            "column by column, errors made up for by later columns; needs calibration",
            Steps(search_scale_and_zero),
            on_text=quantize_with_hessian,
            needs_calibration=True,
            act_order=True,
            for_embeddings="hqq",
            exempt={"any threads": "its products with the Hessian are torch's, whose sums depend on the threads"},
        ),
        Quantizer(
            "auto-round",
            "rounding learned block by block, by the library auto-round; needs calibration",
            None,
            needs_calibration=True,
            whole_model=True,
            for_embeddings="hqq",
        ),
    )
}


def find_quantizer(method: str) -> Quantizer:
    """The table's row. Raises QuantizeError with the list of names for an unknown one."""
    if method not in QUANTIZERS:
        raise QuantizeError(f"there is no quantizer {method!r}; choose one of {', '.join(sorted(QUANTIZERS))}")
    return QUANTIZERS[method]


def require_no_calibration(method: str) -> None:
    """Raise QuantizeError for an unknown method, and for one that needs calibration, where none can be given."""
    if find_quantizer(method).needs_calibration:
        raise QuantizeError(
            f"quantizer={method!r} needs calibration, which only `pack` gives it: "
            "pack(model_dir, out_dir, plan, quantizer, calibration=...)"
        )


def suitable(suits: Callable[[Quantizer], bool]) -> str:
    """The names of the methods that suit, quoted, with "or" before the last: for messages."""
    names = [repr(name) for name, row in QUANTIZERS.items() if suits(row)]
    return " or ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])
