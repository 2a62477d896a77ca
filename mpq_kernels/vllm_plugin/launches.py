"""The parts that a layer keeps, put together into as few products as can be.

    q 4 bits | k 3 bits | v 6 bits     one weight of three row bands, one launch
    q 4 bits | k kept   | v float8     three products, joined

A launch's tensors are parameters of the layer, so that vLLM moves and counts them; `Launch` has their names and what
the operators want beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backends import select
from ..backends.base import Product
from ..format.cut import stack_weights, why_not_stacked
from ..format.float8 import from_float8
from ..format.weights import PackedWeight
from .sources import Float8Weight, Kept

PACKED = ("qweight", "scales", "zeros", "perm")


@dataclass(frozen=True, eq=False)
class Launch:
    """One product. names: of the layer's parameters. rows: (first, count) of the result that are wanted, None: all.

    product, shape: of a packed weight, the backend's function and (segments, out_features, in_features).
    """

    names: dict[str, str]
    rows: tuple[tuple[int, int], ...] | None
    before: int
    after: int
    product: Product | None = None
    embedding: Product | None = None
    shape: tuple[list[int], int, int] | None = None

    def packed(self, layer: Any) -> list[torch.Tensor | None]:
        """The tensors of a packed weight, as operators take them."""
        held = layer._parameters
        return [held[self.names[key]] if key in self.names else None for key in PACKED]

    def run(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (..., K of this rank) -> the rows that are wanted. bias: only where all rows are."""
        if self.before or self.after:
            x = nn.functional.pad(x, (self.before, self.after))
        held = layer._parameters
        if self.product is not None and self.shape is not None:
            y = self.product(x, *self.packed(layer), bias, *self.shape)
        else:
            weight = held[self.names["qweight"]] if "scales" in self.names else held[self.names["weight"]]
            assert weight is not None
            if "scales" in self.names:
                scales = held[self.names["scales"]]
                assert scales is not None
                weight = from_float8(weight, scales, x.dtype)
            y = nn.functional.linear(x, weight.to(x.dtype), bias)
        if self.rows is None:
            return y
        parts = [y.narrow(-1, first, count) for first, count in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@dataclass(frozen=True, eq=False)
class Launches:
    """All products of a layer, in the order of its outputs."""

    each: tuple[Launch, ...]

    def run(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (..., K of this rank) -> (..., N of this rank) in the dtype of x."""
        if len(self.each) == 1 and self.each[0].rows is None:
            return self.each[0].run(layer, x, bias)
        parts = [launch.run(layer, x, None) for launch in self.each]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if bias is None else y + bias


def place(layer: Any, kept: Sequence[Kept]) -> Launches:
    """Make parameters of a layer out of what it keeps, in place of the empty ones that its loader saw."""
    for name in [*PACKED, "weight"]:
        layer._parameters.pop(name, None)
    launches = []
    for number, group in enumerate(_groups(kept)):
        tail = f"_{number}" if number else ""
        launches.append(_launch(layer, group, tail))
    return Launches(tuple(launches))


def _groups(kept: Sequence[Kept]) -> list[list[Kept]]:
    """What can be one weight, beside each other."""
    groups: list[list[Kept]] = []
    for part in kept:
        if groups and _fits(groups[-1], part):
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def _fits(group: list[Kept], part: Kept) -> bool:
    first = group[0]
    if not isinstance(part.weight, PackedWeight) or (part.before, part.after) != (first.before, first.after):
        return False
    # Zeros of each kind that meet are of one dtype; a member without any says nothing of its neighbours.
    return all(
        isinstance(other.weight, PackedWeight) and why_not_stacked(other.weight, part.weight) is None for other in group
    )


def _launch(layer: Any, group: list[Kept], tail: str) -> Launch:
    weight = group[0].weight
    rows, start = [], 0
    for part in group:
        rows.append((start + part.skip, part.size))
        start += _rows(part)
    wanted = None if sum(count for _, count in rows) == start else tuple(rows)
    before, after = group[0].before, group[0].after
    if isinstance(weight, torch.Tensor):
        names = {"weight": f"weight{tail}"}
        _register(layer, names, {"weight": weight})
        return Launch(names, wanted, before, after)
    if isinstance(weight, Float8Weight):
        names = {key: f"{key}{tail}" for key in ("qweight", "scales")}
        _register(layer, names, {"qweight": weight.qweight, "scales": weight.scales})
        return Launch(names, wanted, before, after)
    packed = stack_weights([part.weight for part in group if isinstance(part.weight, PackedWeight)])
    tensors = packed.tensors()
    names = {key: f"{key}{tail}" for key in tensors}
    _register(layer, names, tensors)
    layout = packed.layout
    backend = select(layout, packed.qweight.device.type)
    shape = (layout.segment_ints(), layout.out_features, layout.in_features)
    return Launch(names, wanted, before, after, backend.linear, backend.embedding, shape)


def _rows(part: Kept) -> int:
    """Rows of the weight, those that are not wanted too."""
    weight = part.weight
    if isinstance(weight, PackedWeight):
        return weight.layout.out_features
    return len(weight if isinstance(weight, torch.Tensor) else weight.qweight)


def _register(layer: Any, names: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    for key, name in names.items():
        layer.register_parameter(name, nn.Parameter(tensors[key], requires_grad=False))
