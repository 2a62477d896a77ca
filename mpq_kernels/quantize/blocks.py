"""What quantizers share: one rectangle as groups, the values that can be stored, codes chosen for stored values.

    weight [n, k] --view--> groups [n * k / group_size, group_size] --search--> scale, zero of each --rounding--> codes

A method brings a search, a rounding or both (`Steps`); the loops over segments, groups and chunks are here and in
gptq.py, which makes up for errors between columns.

A search sees groups of fp32 weights as rows and returns fp32 scales and zeros that are already exactly representable
in their stored dtypes, so codes are always chosen for the very numbers that dequantization will use. Sums run along one
row in an order that does not depend on the number of threads (`row_sum`), so equal weights give equal codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import QuantizeError
from ..format.codes import FORMATS, SCALE_DTYPES
from ..format.kinds import KINDS, StorageKind, why_not_kind
from ..format.layout import Segment, WeightLayout, check_group_size
from ..format.weights import TORCH_DTYPES, QuantizedBlock, QuantizedWeight

# Weights handled at once. Searches hold about 6 fp32 temporaries of this size (6 MiB), which stay in the caches: 2**18
# was the fastest of 2**16 .. 2**22, 1.1 s for 4096 x 4096 in one thread against 1.3 s and 3.1 s. No row is ever cut.
CHUNK_WEIGHTS = 2**18

# torch shares the sum of a single row among its threads from 32768 values on, and the result then depends on how many
# there are; longer rows are summed in pieces of this many.
MAX_ROW = 4096


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """How a rectangle is quantized. group_size -1: all its columns. zero: its storage kind, one of ZERO_KINDS."""

    bits: int
    group_size: int = 64
    zero: str = "int"
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.bits not in FORMATS:
            raise QuantizeError(f"bits={self.bits!r} is not one of {sorted(FORMATS)}")
        reason = why_not_kind(self.zero)
        if reason is not None:
            raise QuantizeError(reason)
        if self.scale_dtype not in SCALE_DTYPES:
            raise QuantizeError(f"scale_dtype={self.scale_dtype!r} is not one of {SCALE_DTYPES}")

    @classmethod
    def of(cls, segment: Segment, layout: WeightLayout) -> BlockSpec:
        """That of a segment of a layout."""
        return cls(segment.bits, segment.group_size, segment.zero, layout.scale_dtype)

    @property
    def max_code(self) -> int:
        """Largest code."""
        return FORMATS[self.bits].max_code

    @property
    def kind(self) -> StorageKind:
        """What codes mean."""
        return KINDS[self.zero]

    @property
    def fixed_zero(self) -> float | None:
        """Zero point when none is stored; None where some are."""
        return None if self.kind.fixed is None else self.kind.fixed(self.bits)


Search = Callable[[torch.Tensor, BlockSpec, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
Rounding = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, BlockSpec], torch.Tensor]


def nearest(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: BlockSpec) -> torch.Tensor:
    """Nearest codes (fp32, whole numbers) of groups [G, g] for scales and zeros [G, 1]; a scale of 0 gives code 0."""
    steps = spec.kind.steps(groups, scale, zero).round_().clamp_(0, spec.max_code)
    none = scale == 0
    return steps.masked_fill_(none, 0.0) if bool(none.any()) else steps


@dataclass(frozen=True)
class Steps:
    """What a method does with groups [G, g] of fp32 weights.

    search: (groups, spec, factor) -> scales and zeros [G, 1], fp32, as stored (`storable`, `checked_scale`). factor:
        None, or F [g, g] (its diagonal [g]) such that an error e of a group costs |e F|^2: see hqq.py. Raises
        QuantizeError.
    rounding: (groups, scales, zeros, spec) -> codes [G, g], fp32, whole numbers 0..max_code. Where errors are made up
        for, it is given one column at a time: g is then 1.
    """

    search: Search
    rounding: Rounding = nearest


class BlockInWork:
    """Codes, scales and zeros of one rectangle in their stored dtypes, filled part by part."""

    def __init__(self, rows: int, cols: int, spec: BlockSpec, device: torch.device) -> None:
        """Raises FormatError for a group size that does not divide the columns."""
        self.size = cols if spec.group_size == -1 else spec.group_size
        check_group_size(self.size, cols, f"a block of {rows} x {cols}")
        self.spec, self.groups = spec, cols // self.size
        dtype = TORCH_DTYPES[spec.scale_dtype]
        self.codes = torch.empty(rows, cols, dtype=torch.uint8, device=device)
        self.scales = torch.empty(rows, self.groups, dtype=dtype, device=device)
        self.zeros = torch.empty_like(self.scales, dtype=torch.uint8 if spec.kind.stored == "uint8" else dtype)

    def quantize(
        self, rows: slice, group: slice, values: torch.Tensor, steps: Steps, factor: torch.Tensor | None = None
    ) -> None:
        """Search and round the weights `values` [G, g]: some groups of some rows, one after the other in each row."""
        scale, zero = steps.search(values, self.spec, factor)
        codes = self.codes[rows, group.start * self.size : group.stop * self.size]
        codes.copy_(steps.rounding(values, scale, zero, self.spec).view(codes.shape))
        self.scales[rows, group].copy_(scale.view(len(codes), -1))
        self.zeros[rows, group].copy_(zero.view(len(codes), -1))

    def block(self) -> QuantizedBlock:
        """What has been filled."""
        zeros = None if self.spec.kind.stored is None else self.zeros
        return QuantizedBlock(self.spec.bits, self.codes, self.scales, zeros, self.spec.zero)


def row_parts(rows: int, cols: int) -> Iterator[slice]:
    """Rows in parts of about CHUNK_WEIGHTS weights."""
    step = max(1, CHUNK_WEIGHTS // cols)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def quantize_groups(weight: torch.Tensor, spec: BlockSpec, steps: Steps) -> QuantizedBlock:
    """A finite weight [n, k], every group for itself. Raises QuantizeError; FormatError for a bad group size."""
    n, k = weight.shape
    made = BlockInWork(n, k, spec, weight.device)
    for rows in row_parts(n, k):
        made.quantize(rows, slice(0, made.groups), weight[rows].float().reshape(-1, made.size), steps)
    return made.block()


def quantize_segments(
    weight: torch.Tensor,
    layout: WeightLayout,
    perm: torch.Tensor | None,
    name: str,
    run: Callable[[torch.Tensor, BlockSpec, torch.Tensor], QuantizedBlock],
) -> QuantizedWeight:
    """A weight [N, K] (original column order), every segment for itself.

    run: (weight [n, k] in the codes' order, spec, its columns [k] in the original order) -> block.
    """
    blocks = []
    for s in layout.segments:
        # Columns are picked one segment at a time, so that a permuted copy of the whole weight is never held.
        columns = torch.arange(s.k0, s.k1) if perm is None else perm[s.k0 : s.k1].long()
        part = weight[s.n0 : s.n1]
        part = part[:, s.k0 : s.k1] if perm is None else part[:, columns]
        with naming(name, s, layout):
            blocks.append((s.n0, s.k0, run(part, BlockSpec.of(s, layout), columns)))
    return QuantizedWeight(tuple(blocks), perm)


@contextmanager
def naming(name: str, segment: Segment, layout: WeightLayout) -> Iterator[None]:
    """Put the weight's name, and the place where it has several segments, before the text of a QuantizeError."""
    try:
        yield
    except QuantizeError as error:
        place = f", rows {segment.n0}..{segment.n1}, columns {segment.k0}..{segment.k1}"
        raise QuantizeError(f"{name}{place if len(layout.segments) > 1 else ''}: {error}") from error


def squared_error(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: BlockSpec) -> torch.Tensor:
    """Sum of squared errors [G, 1] of groups [G, g] for stored scales and zeros, rounded to nearest."""
    restored = spec.kind.decode(nearest(groups, scale, zero, spec), scale, zero)
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
    if spec.kind.stored == "uint8":
        zero = zero.round().clamp_(0, spec.max_code)
    elif spec.kind.stored == "scales":
        zero = zero.to(dtype).float()
    return scale.to(dtype).float(), zero


def checked_scale(scale: torch.Tensor, spec: BlockSpec, what: str = "scale") -> torch.Tensor:
    """Scales [G, 1] rounded to the stored dtype, and 0 where nothing is left of them: a group of zeros.

    What is below the normal numbers of fp32 counts as nothing, whatever the dtype. Raises QuantizeError when a scale is
    too large for its dtype. what: what messages call it.
    """
    info = torch.finfo(TORCH_DTYPES[spec.scale_dtype])
    stored = scale.to(TORCH_DTYPES[spec.scale_dtype]).float()
    stored.masked_fill_(scale.abs() < torch.finfo(torch.float32).smallest_normal, 0.0)
    bad = ~torch.isfinite(stored)
    if not bool(bad.any()):
        return stored
    cure = "keep this module in 16 bits, or clean its weights"
    if spec.scale_dtype == "float16":
        cure = "use scale_dtype='bfloat16' or 'float32' for this module"
    raise QuantizeError(
        f"a {what} of {float(scale[bad][0]):.4g} overflows {spec.scale_dtype} (limit {info.max:.4g}): {cure}"
    )
