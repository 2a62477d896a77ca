"""What quantizers share: one rectangle as groups, the values that can be stored, codes chosen for stored values.

    weight [n, k] --view--> groups [n * k / group_size, group_size] --search--> scale, zero per group --encode--> codes

A search sees groups of fp32 weights as rows and returns fp32 scales and zeros that are already exactly representable
in their stored dtypes, so codes are always chosen for the very numbers that dequantization will use. Sums run along one
row in an order that does not depend on the number of threads (`row_sum`), so equal weights give equal codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import QuantizeError
from ..format.codes import FORMATS, SCALE_DTYPES, ZERO_KINDS
from ..format.layout import check_group_size
from ..format.weights import TORCH_DTYPES, QuantizedBlock

# Weights handled at once. Searches hold about 6 fp32 temporaries of this size (6 MiB), which stay in the caches: 2**18
# was the fastest of 2**16 .. 2**22, 1.1 s for 4096 x 4096 in one thread against 1.3 s and 3.1 s. No row is ever cut.
CHUNK_WEIGHTS = 2**18

# torch shares the sum of a single row among its threads from 32768 values on, and the result then depends on how many
# there are; longer rows are summed in pieces of this many.
MAX_ROW = 4096

# A scale may lose at most this part of itself when it is rounded to its stored dtype. Only subnormal ones lose more
# than 2**-9 (bfloat16).
MAX_SCALE_LOSS = 2.0**-4

Search = Callable[[torch.Tensor, "BlockSpec"], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """How a rectangle is quantized. group_size -1: all its columns. zero: one of ZERO_KINDS."""

    bits: int
    group_size: int = 64
    zero: str = "int"
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.bits not in FORMATS:
            raise QuantizeError(f"bits={self.bits!r} is not one of {sorted(FORMATS)}")
        if self.zero not in ZERO_KINDS:
            raise QuantizeError(f"zero={self.zero!r} is not one of {ZERO_KINDS}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise QuantizeError(f"scale_dtype={self.scale_dtype!r} is not one of {SCALE_DTYPES}")

    @property
    def max_code(self) -> int:
        """Largest code."""
        return FORMATS[self.bits].max_code

    @property
    def symmetric_zero(self) -> float:
        """Zero point when none is stored."""
        return FORMATS[self.bits].symmetric_zero


def quantize_groups(weight: torch.Tensor, spec: BlockSpec, search: Search) -> QuantizedBlock:
    """Codes of a finite weight [n, k] for the scales and zeros that `search` picks, chunk by chunk.

    search: (groups fp32 [G, group_size], spec) -> (scales, zeros), fp32 [G, 1] each, as stored. Raises QuantizeError.
    """
    n, k = weight.shape
    size = k if spec.group_size == -1 else spec.group_size
    check_group_size(size, k, f"a block of {n} x {k}")
    per_row = k // size
    device = weight.device
    dtype = TORCH_DTYPES[spec.scale_dtype]
    codes = torch.empty(n, k, dtype=torch.uint8, device=device)
    scales = torch.empty(n, per_row, dtype=dtype, device=device)
    zeros = torch.empty(n, per_row, dtype=torch.uint8 if spec.zero == "int" else dtype, device=device)
    rows = max(1, CHUNK_WEIGHTS // k)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        groups = weight[part].float().reshape(-1, size)
        scale, zero = search(groups, spec)
        codes[part] = encode(groups, scale, zero, spec.max_code).to(torch.uint8).view(-1, k)
        scales[part] = scale.to(dtype).view(-1, per_row)
        zeros[part] = zero.to(zeros.dtype).view(-1, per_row)
    return QuantizedBlock(spec.bits, codes, scales, None if spec.zero == "none" else zeros)


def encode(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, max_code: int) -> torch.Tensor:
    """Nearest codes (fp32, whole numbers) of groups [G, g] for scales and zeros [G, 1]; a scale of 0 gives code 0."""
    steps = (groups / scale).add_(zero).round_().clamp_(0, max_code)
    return steps.nan_to_num_(0.0)


def squared_error(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, max_code: int) -> torch.Tensor:
    """Sum of squared errors [G, 1] of groups [G, g] for stored scales and zeros."""
    restored = encode(groups, scale, zero, max_code).sub_(zero).mul_(scale)
    return row_sum(restored.sub_(groups).square_())


def row_sum(values: torch.Tensor) -> torch.Tensor:
    """Sums [G, 1] along the rows of [G, g], added in an order that depends on g alone."""
    count, size = values.shape
    if size <= MAX_ROW:
        return values.sum(1, keepdim=True)
    whole = size - size % MAX_ROW
    parts = values[:, :whole].reshape(count, -1, MAX_ROW).sum(2)
    return row_sum(torch.cat([parts, values[:, whole:].sum(1, keepdim=True)], dim=1))


def keep_better(
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of two (error, scale, zero), all [G, 1], the one with the smaller error for each group; the first in a tie."""
    better = other[0] < best[0]
    return tuple(torch.where(better, new, old) for old, new in zip(best, other, strict=True))  # type: ignore[return-value]


def storable(scale: torch.Tensor, zero: torch.Tensor, spec: BlockSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest scales and zeros that can be stored, as fp32. Out of range scales and float zeros become Inf."""
    dtype = TORCH_DTYPES[spec.scale_dtype]
    if spec.zero == "int":
        zero = zero.round().clamp_(0, spec.max_code)
    elif spec.zero == "float":
        zero = zero.to(dtype).float()
    return scale.to(dtype).float(), zero


def checked_scale(scale: torch.Tensor, spec: BlockSpec) -> torch.Tensor:
    """Scales [G, 1], none 0, rounded to the stored dtype. Raises QuantizeError when one is out of range for it."""
    stored = scale.to(TORCH_DTYPES[spec.scale_dtype]).float()
    bad = ~torch.isfinite(stored) | ((stored - scale).abs() > MAX_SCALE_LOSS * scale.abs())
    # Below this the fp32 value itself has lost digits, or all of them.
    bad |= scale.abs() < torch.finfo(torch.float32).smallest_normal
    if not bool(bad.any()):
        return stored
    value = float(scale[bad][0])
    large = abs(value) > 1
    info = torch.finfo(TORCH_DTYPES[spec.scale_dtype])
    limit = info.max if large else info.smallest_normal
    word = "overflows" if large else "underflows"
    cure = "keep this module in 16 bits, or clean its weights"
    if spec.scale_dtype == "float16":
        cure = "use scale_dtype='bfloat16' or 'float32' for this module"
    raise QuantizeError(f"a scale of {value:.4g} {word} {spec.scale_dtype} (limit {limit:.4g}): {cure}")
