"""The oracle: what a quantized or packed weight means, in plain torch, on any device.

    W[n, k] = (codes[n, k] - zero) * scale          or codes * scale + zero: kinds.py. One rounding for each of the two
                                                    operations, in fp32 or fp64
    y[M, N] = x[M, K] @ W[N, K].T + bias

Backends must return `dequantize` bit for bit for one-hot x, and agree with `linear` within a derived bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .weights import PackedWeight, QuantizedBlock, QuantizedWeight
from .words import unpack_weight

CHUNK_WEIGHTS = 2**18  # dequantized at once: six temporaries of 1 MiB, which stay in the caches


def dequantize(weight: QuantizedWeight | PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """W [N, K] in the original column order.

    dtype float64 computes in fp64; every other dtype computes in fp32 and rounds once at the end.
    """
    quantized = unpack_weight(weight) if isinstance(weight, PackedWeight) else weight
    layout = quantized.layout
    math = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(layout.out_features, layout.in_features, dtype=math, device=quantized.blocks[0][2].codes.device)
    for n0, k0, block in quantized.blocks:
        n, k = block.codes.shape
        out[n0 : n0 + n, k0 : k0 + k] = dequantize_block(block, math)
    if quantized.perm is not None:
        original = torch.empty_like(out)
        original[:, quantized.perm.long()] = out
        out = original
    return out.to(dtype)


def dequantize_block(block: QuantizedBlock, math: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights of one block, [n, k]; `math` is the dtype of both operations and of the result."""
    # Adding +0 turns a -0 (code equal to zero, negative scale) into the +0 that an accumulator starting at 0 gives.
    return block.kind.decode(*_operands(block, math)).add_(0.0).view(block.codes.shape)


def _operands(block: QuantizedBlock, math: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """codes [n, groups, group_size], scale and zero [n, groups, 1] of a block, as a storage kind takes them."""
    n, k = block.codes.shape
    groups = block.scales.shape[1]
    codes = block.codes.to(math).view(n, groups, k // groups)
    zeros = None if block.zeros is None else block.zeros.to(math).unsqueeze(2)
    return codes, block.scales.to(math).unsqueeze(2), block.kind.zero(block.bits, zeros)


def linear(
    x: torch.Tensor,
    weight: QuantizedWeight | PackedWeight,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """y (..., N) for x (..., K), computed and returned in `dtype`."""
    return torch.nn.functional.linear(x.to(dtype), dequantize(weight, dtype), None if bias is None else bias.to(dtype))


def error_bound(
    x: torch.Tensor, weight: QuantizedWeight | PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Largest |y - linear(x)| that fp32 accumulation in any order, and one rounding to x.dtype, can make: fp64 (.., N).

    A sum of n products is off by at most gamma_n = n u / (1 - n u) times the sum of the magnitudes of its terms
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), u = 2**-24. Kernels sum codes and zeros
    apart, s * (sum x c - z sum x), so the terms are |s| |x| (c + |z|), what a storage kind calls magnitude, and each
    passes at most K + 6 roundings: the additions, the product, the zero, the scale, the bias.
    """
    quantized = unpack_weight(weight) if isinstance(weight, PackedWeight) else weight
    terms = torch.nn.functional.linear(x.double().abs(), magnitudes(quantized))
    if bias is not None:
        terms = terms + bias.double().abs()
    roundings = (quantized.layout.in_features + 6) * 2.0**-24
    accumulated = terms * roundings / (1 - roundings)
    y = linear(x, weight, bias)
    info = torch.finfo(x.dtype)
    # Rounding to nearest: half a unit in the last place of the result, or half the smallest subnormal.
    return accumulated + (y.abs() + accumulated) * info.eps / 2 + info.smallest_normal * info.eps / 2


def magnitudes(quantized: QuantizedWeight) -> torch.Tensor:
    """Magnitude of every weight's terms, such as |scale| (code + |zero|): fp64 [N, K] in the original column order."""
    layout = quantized.layout
    total = torch.empty(layout.out_features, layout.in_features, dtype=torch.float64)
    for n0, k0, block in quantized.blocks:
        n, k = block.codes.shape
        total[n0 : n0 + n, k0 : k0 + k] = block.kind.magnitude(*_operands(block, torch.float64)).view(n, k)
    if quantized.perm is not None:
        total[:, quantized.perm.long()] = total.clone()
    return total


@dataclass(frozen=True, slots=True)
class WeightError:
    """relative: ||W - restored W|| / ||W|| (Frobenius), 0 for zeros that stay so. largest: max |W - restored W|."""

    relative: float
    largest: float


def weight_error(weight: torch.Tensor, quantized: QuantizedWeight) -> WeightError:
    """Error of `quantized` as a stand-in for weight [N, K], both in the original column order; sums in fp64."""
    off, norm, largest = 0.0, 0.0, 0.0
    for n0, k0, block in quantized.blocks:
        n, k = block.codes.shape
        columns = None if quantized.perm is None else quantized.perm[k0 : k0 + k].long()
        rows = max(1, CHUNK_WEIGHTS // k)
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            restored = dequantize_block(block.part(part))
            band = weight[n0 + part.start : n0 + part.stop]
            wanted = (band[:, k0 : k0 + k] if columns is None else band[:, columns]).float()
            difference = restored.sub_(wanted)
            off += torch.linalg.vector_norm(difference, dtype=torch.float64).item() ** 2
            norm += torch.linalg.vector_norm(wanted, dtype=torch.float64).item() ** 2
            largest = max(largest, difference.abs_().max().item())
    if norm == 0.0:
        return WeightError(0.0 if off == 0.0 else math.inf, largest)
    return WeightError(math.sqrt(off / norm), largest)
