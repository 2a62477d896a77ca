"""Loads the operators of csrc/torch/cpu_ops.cpp and says what they return without running them.

Schemas and CPU kernels are registered by csrc/torch/cpu_ops.cpp; the fakes, which torch.compile and torch.export trace
with, stand here once for every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UnsupportedError
from ..format.codes import LAYOUT_ID
from .operands import by_name

LIBRARY = Path(__file__).parents[1] / "_ops.so"


def _load_library() -> None:
    if not LIBRARY.exists():
        raise UnsupportedError(
            f"{LIBRARY.name}, the compiled operators, is missing in {LIBRARY.parent.name}/: build it with "
            "`pip install .` in the source tree (a C++20 compiler is enough)"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise UnsupportedError(
            f"{LIBRARY.name} does not load under torch {torch.__version__} ({error}): it needs torch 2.11 or later"
        ) from error
    built = torch.ops.mpq.layout_id()
    if built != LAYOUT_ID:
        raise UnsupportedError(
            f"the operators were built for layout {built}, this package has {LAYOUT_ID}: build again (`pip install .`)"
        )


_load_library()


def _same_device(operator: Any, args: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name. Raises RuntimeError for tensors of several devices.

    Without this a weight on the meta device, one that was never loaded, would give memory that nobody wrote.
    """
    named = by_name(operator, args, given)
    devices = {value.device for value in named.values() if isinstance(value, torch.Tensor)}
    torch._check(len(devices) == 1, lambda: f"tensors are on several devices: {sorted(map(str, devices))}")
    return named


@torch.library.register_fake("mpq::linear_int8")
@torch.library.register_fake("mpq::linear")
def linear_fake(*args: Any, **given: Any) -> torch.Tensor:
    """y (..., N) of x (..., K), without values."""
    named = _same_device(torch.ops.mpq.linear.default, args, given)
    x, in_features = named["x"], named["in_features"]
    torch._check(x.dim() >= 1, lambda: "x must have at least one dimension")
    torch._check(x.shape[-1] == in_features, lambda: f"x must be (..., in_features={in_features})")
    return x.new_empty(*x.shape[:-1], named["out_features"])


@torch.library.register_fake("mpq::silu_mul_linear")
def silu_mul_linear_fake(*args: Any, **given: Any) -> torch.Tensor:
    """y (..., N) of gate and up, both (..., K), without values."""
    named = _same_device(torch.ops.mpq.silu_mul_linear.default, args, given)
    gate, up, in_features = named["gate"], named["up"], named["in_features"]
    torch._check(up.dim() >= 1 and up.shape[-1] == in_features, lambda: f"up must be (..., in_features={in_features})")
    torch._check(gate.shape == up.shape, lambda: "gate and up must have one shape")
    return up.new_empty(*up.shape[:-1], named["out_features"])


@torch.library.register_fake("mpq::grouped_linear_int8")
@torch.library.register_fake("mpq::grouped_linear")
def grouped_linear_fake(*args: Any, **given: Any) -> torch.Tensor:
    """y (T, N / experts) of x (T, K), without values."""
    named = _same_device(torch.ops.mpq.grouped_linear.default, args, given)
    x, offsets, in_features = named["x"], named["offsets"], named["in_features"]
    torch._check(x.dim() == 2 and x.shape[1] == in_features, lambda: f"x must be (T, in_features={in_features})")
    torch._check(offsets.dim() == 1 and offsets.shape[0] >= 2, lambda: "offsets must be (experts + 1,)")
    return x.new_empty(x.shape[0], named["out_features"] // (offsets.shape[0] - 1))


@torch.library.register_fake("mpq::dequantize")
def dequantize_fake(*args: Any, **given: Any) -> torch.Tensor:
    """W (N, K) of the dtype asked for, without values."""
    named = _same_device(torch.ops.mpq.dequantize.default, args, given)
    return named["qweight"].new_empty(named["out_features"], named["in_features"], dtype=named["dtype"])


@torch.library.register_fake("mpq::embedding")
def embedding_fake(*args: Any, **given: Any) -> torch.Tensor:
    """Rows (..., K) of W for ids (...), of the dtype asked for, without values."""
    named = _same_device(torch.ops.mpq.embedding.default, args, given)
    return named["qweight"].new_empty(*named["ids"].shape, named["in_features"], dtype=named["dtype"])
