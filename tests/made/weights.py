"""Random quantized weights and the lists that tests iterate: the support matrix."""

import itertools

import torch

from mpq_kernels.format import reference
from mpq_kernels.format.codes import FORMATS, SCALE_DTYPES
from mpq_kernels.format.kinds import ZERO_KINDS
from mpq_kernels.format.layout import Segment
from mpq_kernels.format.weights import TORCH_DTYPES, QuantizedBlock, QuantizedWeight

BITS = tuple(FORMATS)
ZEROS = ZERO_KINDS
X_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Sizes below, at and above whole supertiles, and of real models.
SIZES = (1, 63, 65, 172, 640)
TOKENS = (0, 1, 2, 7, 17, 33, 129)

# Row bands and column segments of different widths, groups and zeros in one weight of 200 x 320.
MIXED_SEGMENTS = (
    Segment(0, 70, 0, 128, 3, 64, "int"),
    Segment(0, 70, 128, 320, 8, 32, "int"),
    Segment(70, 134, 0, 320, 2, 16, "half"),
    Segment(134, 199, 0, 64, 5, 64, "int"),
    Segment(134, 199, 64, 192, 1, 128, "none"),
    Segment(134, 199, 192, 320, 6, 8, "int"),
    Segment(199, 200, 0, 320, 7, 320, "int"),
)


def generator(seed: int) -> torch.Generator:
    """Seeded generator."""
    return torch.Generator().manual_seed(seed)


def random_block(n, k, bits, group_size, zero="int", scale_dtype="float16", seed=0) -> QuantizedBlock:
    """Codes over their whole range, scales of both signs, zeros inside and outside the codes."""
    rng = generator(seed)
    groups = k // group_size
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=rng)
    codes.view(-1)[0] = (1 << bits) - 1
    scales = (torch.rand(n, groups, generator=rng) + 0.5) * torch.where(
        torch.rand(n, groups, generator=rng) < 0.2, -1.0, 1.0
    )
    dtype = TORCH_DTYPES[scale_dtype]
    zeros = None
    if zero == "int":
        zeros = torch.randint(0, min(256, (1 << bits) + 1), (n, groups), dtype=torch.int32, generator=rng)
        zeros = zeros.to(torch.uint8)
    elif zero == "float":
        zeros = (torch.rand(n, groups, generator=rng) * (1 << bits) - 0.5).to(dtype)
    elif zero == "min":
        zeros = ((torch.rand(n, groups, generator=rng) - 0.5) * (1 << bits)).to(dtype)
        scales[torch.rand(n, groups, generator=rng) < 0.1] = 0.0  # a group of one value
    return QuantizedBlock(bits, codes, scales.to(dtype), zeros, zero)


def random_weight(n, k, bits, group_size=-1, zero="int", scale_dtype="float16", permuted=False, seed=0):
    """Uniform QuantizedWeight."""
    block = random_block(n, k, bits, k if group_size == -1 else group_size, zero, scale_dtype, seed)
    return QuantizedWeight.uniform(block, random_perm(k, seed) if permuted else None)


def random_perm(k, seed=0) -> torch.Tensor:
    """int32 permutation of 0..k-1."""
    return torch.randperm(k, generator=generator(seed + 1)).to(torch.int32)


def mixed_weight(scale_dtype="float16", permuted=False, seed=0) -> QuantizedWeight:
    """A weight of MIXED_SEGMENTS."""
    blocks = tuple(
        (s.n0, s.k0, random_block(s.rows, s.cols, s.bits, s.group_size, s.zero, scale_dtype, seed + i))
        for i, s in enumerate(MIXED_SEGMENTS)
    )
    return QuantizedWeight(blocks, random_perm(320, seed) if permuted else None)


def support_matrix():
    """(bits, zero, scale dtype) of every kind of weight."""
    return list(itertools.product(BITS, ZEROS, SCALE_DTYPES))


def expert_case():
    """(weight, x, offsets, rows): five stacked experts of 1 to 5 bits and 72 rows each, of which one gets no token."""
    rows, k, counts = 72, 192, (0, 3, 20, 1, 70)
    blocks = [(e * rows, 0, random_block(rows, k, 1 + e, 64, "int", "float16", e)) for e in range(5)]
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    return QuantizedWeight(tuple(blocks), None), torch.randn(sum(counts), k).half(), offsets, rows


def check_experts(y, x, weight, offsets, rows, margin=4):
    """y of stacked experts of `rows` rows against fp64; see error_bound for `margin`: tensor cores truncate."""
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        wanted = reference.linear(x[begin:end], weight)[:, e * rows : (e + 1) * rows]
        bound = margin * reference.error_bound(x[begin:end], weight)[:, e * rows : (e + 1) * rows]
        assert ((y[begin:end].double() - wanted).abs() <= bound).all()
