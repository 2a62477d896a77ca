"""The waist: `QuantizedWeight` (what quantizers and importers make) and `PackedWeight` (what backends read).

    checkpoint -> QuantizedWeight --packing.pack--> PackedWeight -> backends

Both mean codes with one scale (and zero) for each row and group of columns, W = (code - zero) * scale or what else
kinds.py says. Neither knows where it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import FormatError
from .codes import FORMATS, SCALE_DTYPES
from .kinds import KINDS, StorageKind, why_not_kind
from .layout import Segment, SizeBreakdown, WeightLayout

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "uint8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, eq=False)
class QuantizedBlock:
    """A rectangle of codes of one width.

    codes: uint8 [n, k], each < 2**bits.
    scales: fp32/fp16/bf16 [n, k / group_size].
    zeros: same shape as the scales; None, uint8 or the dtype of the scales, as the storage kind wants it.
    zero: the storage kind; "": "none", "int" or "float", whichever these zeros are.
    """

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    zero: str = ""

    def __post_init__(self) -> None:
        if not self.zero:
            stored = "none" if self.zeros is None else "int" if self.zeros.dtype == torch.uint8 else "float"
            object.__setattr__(self, "zero", stored)
        reason = why_not_kind(self.zero)
        if reason is not None:
            raise FormatError(reason)
        if self.bits not in FORMATS:
            raise FormatError(f"bits={self.bits} is not one of {sorted(FORMATS)}")
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2 or 0 in self.codes.shape:
            raise FormatError(f"codes must be a non-empty uint8 [n, k], not {_describe(self.codes)}")
        if int(self.codes.max()) > FORMATS[self.bits].max_code:
            raise FormatError(f"code {int(self.codes.max())} does not fit {self.bits} bits")
        n, k = self.codes.shape
        if self.scales.dtype not in DTYPE_NAMES or DTYPE_NAMES[self.scales.dtype] not in SCALE_DTYPES:
            raise FormatError(f"scales must be one of {SCALE_DTYPES}, not {_describe(self.scales)}")
        if self.scales.dim() != 2 or self.scales.shape[0] != n or not self.scales.shape[1] or k % self.scales.shape[1]:
            raise FormatError(f"scales must be [{n}, groups] with groups dividing {k}, not {_describe(self.scales)}")
        if not bool(torch.isfinite(self.scales).all()):
            raise FormatError(f"scales hold NaN or Inf in {DTYPE_NAMES[self.scales.dtype]}: use scale_dtype='float32'")
        self._check_zeros()

    def _check_zeros(self) -> None:
        if (self.zeros is None) != (self.kind.stored is None):
            raise FormatError(f"zero={self.zero!r}: zeros are {'missing' if self.zeros is None else 'given'}")
        if self.zeros is None:
            return
        if self.zeros.shape != self.scales.shape or self.zeros.dtype not in (torch.uint8, self.scales.dtype):
            raise FormatError(
                f"zeros must be uint8 or {self.scales.dtype} of shape {tuple(self.scales.shape)}, "
                f"not {_describe(self.zeros)}"
            )
        if (self.zeros.dtype == torch.uint8) != (self.kind.stored == "uint8"):
            raise FormatError(f"zero={self.zero!r}: zeros are {_describe(self.zeros)}")
        if self.zeros.dtype != torch.uint8 and not bool(torch.isfinite(self.zeros).all()):
            raise FormatError("float zeros hold NaN or Inf")

    @property
    def group_size(self) -> int:
        """Codes along K that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def kind(self) -> StorageKind:
        """What the codes mean."""
        return KINDS[self.zero]

    @property
    def zero_groups(self) -> int:
        """How many groups of rows are zeros because their scale is 0, and their minimum if they have one."""
        empty = self.scales == 0
        return int((empty & (self.zeros == 0) if self.zero == "min" else empty).sum())

    def part(self, rows: slice) -> QuantizedBlock:
        """Some of its rows, as views."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return QuantizedBlock(self.bits, self.codes[rows], self.scales[rows], zeros, self.zero)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Codes of a whole weight [N, K]: one block for each segment, placed at (n0, k0), sorted.

    perm: int32 [K] or None. Column j of the codes is column perm[j] of the original weight.
    """

    blocks: tuple[tuple[int, int, QuantizedBlock], ...]
    perm: torch.Tensor | None = None

    @classmethod
    def uniform(cls, block: QuantizedBlock, perm: torch.Tensor | None = None) -> QuantizedWeight:
        """One block that is the whole weight."""
        return cls(((0, 0, block),), perm)

    @classmethod
    def stack(cls, members: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Members above each other along N: a fused weight. All must have the same permutation of K, or none."""
        first = members[0].perm
        blocks, row = [], 0
        for member in members:
            same = member.perm is first or (
                member.perm is not None and first is not None and torch.equal(member.perm, first)
            )
            if not same:
                raise FormatError("fused weights read the same x, so their permutations of K must be equal")
            blocks += [(row + n0, k0, block) for n0, k0, block in member.blocks]
            row += member.layout.out_features
        return cls(tuple(blocks), first)

    @property
    def layout(self) -> WeightLayout:
        """The layout that packing gives these codes. Raises FormatError when the blocks do not tile a rectangle."""
        segments = tuple(
            Segment(n0, n0 + b.codes.shape[0], k0, k0 + b.codes.shape[1], b.bits, b.group_size, b.zero)
            for n0, k0, b in self.blocks
        )
        dtypes = {b.scales.dtype for _, _, b in self.blocks}
        if len(dtypes) != 1:
            raise FormatError(f"the scales of one weight have one dtype, not {sorted(map(str, dtypes))}")
        rows, cols = max(s.n1 for s in segments), max(s.k1 for s in segments)
        return WeightLayout(rows, cols, segments, DTYPE_NAMES[dtypes.pop()], self.perm is not None)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Kernel-ready tensors of one weight and the layout that explains them. All are one-dimensional.

    qweight: int32 words. scales: layout.scale_dtype. zeros: layout.zero_dtype, or None. perm: int32 [K], or None.
    Construction checks dtypes and shapes (not values: see `check_values`) and raises FormatError.
    """

    layout: WeightLayout
    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    perm: torch.Tensor | None = None

    def __post_init__(self) -> None:
        specs = self.layout.tensor_specs()
        for name in ("qweight", "scales", "zeros", "perm"):
            tensor: torch.Tensor | None = getattr(self, name)
            if (tensor is None) != (name not in specs):
                raise FormatError(f"{name} is {'missing' if tensor is None else 'not expected'} in this layout")
            if tensor is None:
                continue
            dtype, shape = specs[name]
            if tensor.dtype != TORCH_DTYPES[dtype] or tuple(tensor.shape) != shape:
                raise FormatError(f"{name} must be {dtype} {list(shape)}, not {_describe(tensor)}")

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name -> tensor, in the order in which they are stored."""
        return {name: getattr(self, name) for name in self.layout.tensor_specs()}

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device; dtypes never change."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return PackedWeight(self.layout, **moved)

    def size(self) -> SizeBreakdown:
        """Stored bits by purpose, checked against the bytes of the tensors themselves."""
        size = self.layout.size()
        held = sum(t.numel() * t.element_size() for t in self.tensors().values())
        if held != size.total_bytes:
            raise FormatError(f"tensors hold {held} bytes where the layout accounts for {size.total_bytes}")
        return size

    def rows(self, n0: int, n1: int) -> PackedWeight:
        """Rows n0..n1 as a view (no copy); both must be cuts between row bands. Raises FormatError otherwise."""
        layout, parts = self.layout.rows(n0, n1)
        tensors = {name: getattr(self, name).narrow(0, *part) for name, part in parts.items() if part[1]}
        return PackedWeight(layout, **tensors, perm=self.perm)

    def check_values(self) -> None:
        """Raise FormatError for values that no packer writes: NaN or Inf, a permutation with a hole or a repeat."""
        for name in ("scales", "zeros"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise FormatError(f"{name} hold NaN or Inf")
        if self.perm is not None:
            expected = torch.arange(self.layout.in_features, dtype=torch.int32, device=self.perm.device)
            if not torch.equal(self.perm.sort().values, expected):
                raise FormatError(f"perm is not a permutation of 0..{self.layout.in_features - 1}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
