"""MLX on the CPU: words of its `quantize`, dequantized by its `dequantize` with scales and biases as fp32."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import torch

from . import Golden

N, K = 32, 128
DTYPES = {mx.float16: torch.float16, mx.bfloat16: torch.bfloat16, mx.float32: torch.float32}
CASES = {f"{bits} bits": (bits, size, dtype) for bits, size, dtype in (
    (2, 32, mx.float16), (3, 64, mx.bfloat16), (4, 64, mx.bfloat16), (5, 32, mx.float16), (6, 128, mx.float32),
    (8, 32, mx.bfloat16),
)}  # fmt: skip


def make() -> Golden:
    """Every case."""
    golden = Golden()
    mx.random.seed(0)
    for case, (bits, size, dtype) in CASES.items():
        weight = mx.random.normal((N, K)).astype(dtype)
        codes, scales, biases = mx.quantize(weight, group_size=size, bits=bits)
        wide = (scales.astype(mx.float32), biases.astype(mx.float32))
        dense = torch.from_numpy(np.array(mx.dequantize(codes, *wide, group_size=size, bits=bits)))
        floats = [torch.from_numpy(np.array(each)).to(DTYPES[dtype]) for each in wide]
        tensors = {"m.weight": torch.from_numpy(np.array(codes)), "m.scales": floats[0], "m.biases": floats[1]}
        golden.add(case, tensors, {"bits": bits, "group_size": size}, dense)
    return golden
