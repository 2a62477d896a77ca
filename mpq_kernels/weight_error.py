"""How far a quantized weight is from the one it was made of, without ever holding it dequantized whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .reference import dequantize_block
from .weights import QuantizedBlock, QuantizedWeight

CHUNK_WEIGHTS = 2**18  # dequantized at once: six temporaries of 1 MiB, which stay in the caches


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
            zeros = None if block.zeros is None else block.zeros[part]
            restored = dequantize_block(QuantizedBlock(block.bits, block.codes[part], block.scales[part], zeros))
            band = weight[n0 + part.start : n0 + part.stop]
            wanted = (band[:, k0 : k0 + k] if columns is None else band[:, columns]).float()
            difference = restored.sub_(wanted)
            off += torch.linalg.vector_norm(difference, dtype=torch.float64).item() ** 2
            norm += torch.linalg.vector_norm(wanted, dtype=torch.float64).item() ** 2
            largest = max(largest, difference.abs_().max().item())
    if norm == 0.0:
        return WeightError(0.0 if off == 0.0 else math.inf, largest)
    return WeightError(math.sqrt(off / norm), largest)
