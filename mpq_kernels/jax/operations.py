"""The operations on a Weight, each one custom call of XLA: under jit, vmap over tokens, grad in x, and jax.export.

linear           x (..., K)              -> (..., N)      in the dtype of x, sums in fp32
grouped_linear   x (T, K), offsets       -> (T, N / E)
embedding        ids (...)               -> (..., K)
dequantize                               -> W [N, K]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import FormatError
from . import build
from .weight import Weight

COUNTER_BYTES = 1024  # MPQ_COUNTER_BYTES of csrc/include/mpq.h
ACTIVATIONS = ("exact", "int8")
TENSORS = ("qweight", "scales", "zeros", "perm")


def linear(x: jax.Array, weight: Weight, activations: str = "exact") -> jax.Array:
    """y = x @ W.T + bias. x: (..., K) float32, float16 or bfloat16; on CUDA not float32. Returns (..., N) of x's dtype.

    activations: "int8" rounds x for each token and block of columns (CPU only). The gradient of x is that of the exact
    product; weights and bias have none. Raises FormatError for another last dimension.
    """
    if not x.ndim or x.shape[-1] != weight.in_features:
        raise FormatError(f"x must be (..., in_features={weight.in_features}), not {x.shape}")
    return _differentiable(_int8(activations), x, weight)


def grouped_linear(x: jax.Array, weight: Weight, offsets: jax.Array, activations: str = "exact") -> jax.Array:
    """Experts: rows offsets[e] .. offsets[e + 1] of x times the e-th of E equal shares of W. x: (T, K) -> (T, N / E).

    offsets: int32 [E + 1], from 0 to T, not decreasing; read when the product runs. Raises FormatError for shapes.
    """
    experts = offsets.size - 1
    if x.ndim != 2 or x.shape[1] != weight.in_features or offsets.ndim != 1:
        raise FormatError(f"x must be (T, in_features={weight.in_features}) and offsets one-dimensional")
    if experts < 1 or weight.out_features % experts or weight.experts not in (0, experts):
        raise FormatError(
            f"offsets name {experts} experts, the weight has {weight.experts or weight.out_features} rows"
        )
    out = jax.ShapeDtypeStruct((len(x), weight.out_features // experts), x.dtype)
    operands = (x, *_operands(weight), _or_none(weight.bias, x.dtype), offsets.astype(jnp.int32))
    return _call("grouped_linear", out, operands, weight, "sequential", int8=_int8(activations))


def embedding(ids: jax.Array, weight: Weight, dtype: Any = jnp.float32) -> jax.Array:
    """Rows of W by number. ids: integers (...), below N when the rows are looked up. Returns (..., K) of dtype."""
    low = ids.astype(jnp.int32)
    pairs = jnp.stack([low, low >> 31], axis=-1)  # int64, of which jax has none unless it is told to
    out = jax.ShapeDtypeStruct((*ids.shape, weight.in_features), dtype)
    return _call("embedding", out, (pairs, *_operands(weight)), weight, "expand_dims")


def dequantize(weight: Weight, dtype: Any = jnp.float32) -> jax.Array:
    """W [N, K] of dtype, columns in their original order: (codes - zeros) * scales, rounded once."""
    out = jax.ShapeDtypeStruct((weight.out_features, weight.in_features), dtype)
    return _call("dequantize", out, _operands(weight), weight, "sequential")


def _int8(activations: str) -> bool:
    if activations not in ACTIVATIONS:
        raise FormatError(f"activations={activations!r} is not one of {ACTIVATIONS}")
    return activations == "int8"


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(int8: bool, x: jax.Array, weight: Weight) -> jax.Array:
    out = jax.ShapeDtypeStruct((*x.shape[:-1], weight.out_features), x.dtype)
    operands = (x, *_operands(weight), _or_none(weight.bias, x.dtype))
    return _call("linear", out, operands, weight, "expand_dims", counters=True, int8=int8)


def _forward(int8: bool, x: jax.Array, weight: Weight) -> tuple[jax.Array, Weight]:
    return _differentiable(int8, x, weight), weight


def _backward(int8: bool, weight: Weight, dy: jax.Array) -> tuple[jax.Array, None]:
    dense = dequantize(weight)
    return (dy.astype(jnp.float32) @ dense).astype(dy.dtype), None


_differentiable.defvjp(_forward, _backward)


def _or_none(array: jax.Array | None, dtype: Any) -> jax.Array:
    """What handlers take for an array that is not there."""
    return jnp.zeros((0,), dtype) if array is None else array


def _operands(weight: Weight) -> tuple[jax.Array, ...]:
    return tuple(_or_none(getattr(weight, name), jnp.int32) for name in TENSORS)


def _call(
    operation: str,
    out: jax.ShapeDtypeStruct,
    operands: tuple[jax.Array, ...],
    weight: Weight,
    vmap_method: str,
    counters: bool = False,
    **flags: bool,
) -> jax.Array:
    """The handler of the platform that the computation is compiled for."""
    build.register()
    attributes: dict[str, Any] = {name: np.int64(value) for name, value in flags.items()}
    attributes |= {
        "segments": np.array(weight.layout.segment_ints(), np.int64),
        "out_features": np.int64(weight.out_features),
        "in_features": np.int64(weight.in_features),
    }

    def cpu(*given: jax.Array) -> jax.Array:
        return jax.ffi.ffi_call(f"mpq_{operation}_cpu", out, vmap_method=vmap_method)(*given, **attributes)

    def cuda(*given: jax.Array) -> jax.Array:
        call = partial(jax.ffi.ffi_call, f"mpq_{operation}_cuda", vmap_method=vmap_method)
        if not counters:
            return call(out)(*given, **attributes)
        zeros = jnp.zeros((COUNTER_BYTES,), jnp.uint8)
        both = call((out, zeros), input_output_aliases={len(given): 1})(*given, zeros, **attributes)
        return both[0]

    handlers: dict[str, Callable[..., jax.Array]] = {"cpu": cpu, "cuda": cuda}
    built = {name: handlers[name] for name in build.platforms()}
    return cpu(*operands) if len(built) == 1 else jax.lax.platform_dependent(*operands, **built)
