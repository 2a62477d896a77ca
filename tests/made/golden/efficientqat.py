"""EfficientQAT is no library: its `pack` of one layer (quantize.int_linear_real), code by code as it is there."""

from __future__ import annotations

import torch

from . import Golden

N, K = 32, 64
CASES = {"2 bits": (2, 32, torch.float16), "3 bits": (3, 32, torch.float16), "4 bits": (4, 64, torch.float32)}


def make() -> Golden:
    """Every case."""
    golden = Golden()
    for seed, (case, (bits, size, dtype)) in enumerate(CASES.items()):
        rng = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 2**bits, (K, N), generator=rng)
        scales = (torch.rand(K // size, N, generator=rng) * 0.02 + 0.001).to(dtype)
        zeros = torch.randint(0, 2**bits, scales.shape, generator=rng)
        weight = ((codes.view(-1, size, N) - zeros[:, None]) * scales[:, None]).view(K, N).T
        tensors = {
            "m.qweight": packed(codes, bits),
            "m.qzeros": packed(zeros.T, bits).T,
            "m.scales": scales,
            "m.g_idx": (torch.arange(K) // size).to(torch.int32),
        }
        golden.add(case, tensors, {}, weight)
    return golden


def packed(values, bits):
    """[count, columns] -> int32 words of 32 // bits codes each, the first in the lowest bits."""
    held = 32 // bits
    words = torch.zeros(-(-len(values) // held), values.shape[1], dtype=torch.int64)
    for index, row in enumerate(values):
        words[index // held] |= row << bits * (index % held)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
