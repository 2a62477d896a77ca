"""The arguments of the operators, by name. Their order stands in the schemas of csrc/torch and nowhere in Python.

mpq::linear          x,  weight, bias           -> y          weight: seven arguments, WEIGHT, which `on_weight`
mpq::grouped_linear  x,  weight, bias, offsets  -> y          turns into one checked PackedWeight
mpq::dequantize          weight, dtype          -> W
mpq::embedding       ids, weight, dtype        -> rows of W
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, wraps
from typing import Any

import torch

from ..errors import FormatError
from ..format.layout import WeightLayout, segments_from_ints
from ..format.weights import DTYPE_NAMES, PackedWeight

WEIGHT = ("qweight", "scales", "zeros", "perm", "segments", "out_features", "in_features")


def by_name(operator: Any, args: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call to an operator (an overload such as torch.ops.mpq.linear.default)."""
    return dict(zip(_names(operator), args, strict=False)) | dict(given)


@cache
def _names(operator: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in operator._schema.arguments)


def on_weight(operator: Any) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Gives a function of `weight` (a PackedWeight) and the operator's other arguments the operator's own signature.

    Raises FormatError, before `run` is called, for tensors that do not fit, or are on several devices.
    """

    def decorate(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @wraps(run)
        def call(*args: Any, **given: Any) -> torch.Tensor:
            named = by_name(operator, args, given)
            weight = packed_weight(*(named.pop(name) for name in WEIGHT))
            for name, value in named.items():
                if isinstance(value, torch.Tensor):
                    _check_device(name, value, weight.qweight)
            return run(weight=weight, **named)

        return call

    return decorate


def packed_weight(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    segments: Sequence[int],
    out_features: int,
    in_features: int,
) -> PackedWeight:
    """The weight that operators are given. Raises FormatError for tensors that do not fit the table of segments."""
    dtype = DTYPE_NAMES.get(scales.dtype, str(scales.dtype))
    layout = _layout(tuple(segments), out_features, in_features, dtype, perm is not None)
    weight = PackedWeight(layout, qweight, scales, zeros, perm)
    for name, tensor in (("qweight", qweight), ("scales", scales), ("zeros", zeros), ("perm", perm)):
        if tensor is None:
            continue
        if not tensor.is_contiguous():
            raise FormatError(f"{name} must be contiguous")
        _check_device(name, tensor, qweight)
    return weight


def _check_device(name: str, tensor: torch.Tensor, qweight: torch.Tensor) -> None:
    if tensor.device != qweight.device:
        raise FormatError(f"{name} is on {tensor.device}, qweight on {qweight.device}")


@lru_cache(maxsize=4096)
def _layout(
    segments: tuple[int, ...], out_features: int, in_features: int, scale_dtype: str, permuted: bool
) -> WeightLayout:
    return WeightLayout(out_features, in_features, segments_from_ints(segments), scale_dtype, permuted)
