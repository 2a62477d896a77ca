"""`mpq::linear_rows`: some rows of a product, of which a compiled graph computes the whole once for all that ask.

    q = linear_rows(x, W, 0, 96)                   y = linear(x, W)
    k = linear_rows(x, W, 96, 128)    becomes      q, k, v = y[..., :96], y[..., 96:128], y[..., 128:]
    v = linear_rows(x, W, 128, 168)

torch.compile first writes down what a model calls, then runs that list once more to make the graph of it. Only in the
second run is it certain that two x are one: a change in place is seen there. So in the list the operator stands for
each of the projections, and in the graph for none: it is composite, and takes itself apart as described.
"""

from __future__ import annotations

import weakref

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import ops  # noqa: F401  (the operators that do the work)

LIBRARY = torch.library.Library("mpq", "FRAGMENT")
LIBRARY.define(
    "linear_rows(str product, Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, "
    "int[] segments, int out_features, int in_features, int n0, int n1) -> Tensor"
)


class _Whole:
    """The product of one x with one weight."""

    def __init__(self, x: torch.Tensor, qweight: torch.Tensor, y: torch.Tensor) -> None:
        self.version, self.qweight, self.y = x._version, weakref.ref(qweight), y


# x -> its last product. While a graph is made these are tensors without values, which go with the list.
_WHOLES = WeakIdKeyDictionary()


def _linear_rows(
    product: str,
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    segments: list[int],
    out_features: int,
    in_features: int,
    n0: int,
    n1: int,
) -> torch.Tensor:
    """Rows n0..n1 of the operator called `product`, with its arguments: x (..., K) -> (..., n1 - n0)."""
    if x.is_inference():  # counts no changes
        whole = _product(product)(x, qweight, scales, zeros, perm, bias, segments, out_features, in_features)
        return whole[..., n0:n1]
    held: _Whole | None = _WHOLES.get(x)
    if held is None or held.version != x._version or held.qweight() is not qweight:
        whole = _product(product)(x, qweight, scales, zeros, perm, bias, segments, out_features, in_features)
        held = _WHOLES[x] = _Whole(x, qweight, whole)
    return held.y[..., n0:n1]


def product_name(product: object) -> str | None:
    """What `linear_rows` calls a backend's product; None for one that is no operator."""
    return product.name() if isinstance(product, torch._ops.OpOverload) else None


def _product(name: str) -> torch._ops.OpOverload:
    space, _, operator = name.partition("::")
    found: torch._ops.OpOverload = getattr(getattr(torch.ops, space), operator.partition(".")[0]).default
    return found


LIBRARY.impl("linear_rows", _linear_rows, "CompositeImplicitAutograd")
