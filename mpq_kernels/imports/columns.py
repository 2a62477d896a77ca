"""Which columns of a weight share a scale, as other formats say it, and as the segments and the permutation of ours.

    g_idx [K]     the group of every column, in any order         -> columns sorted by group: a permutation
    groups of G   the last one shorter where G does not divide K  -> two segments, where their cut is a multiple of 64

Where groups have other sizes, each is cut into groups of a common divisor, which have its scale. That is exact, and
only takes more bytes.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from ..format.codes import TILE_K
from ..format.layout import Segment, WeightLayout
from ..format.weights import DTYPE_NAMES, QuantizedBlock, QuantizedWeight

MIN_GROUP = 8  # smaller groups would take more bytes for their scales than for their codes


@dataclass(frozen=True)
class Run:
    """Columns k0..k1, in the packed order, in groups of `size`."""

    k0: int
    k1: int
    size: int


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of a weight. perm: int32 [K], column j of the codes is column perm[j] of the weight; None: as it is.

    groups: for every group in the packed order, its number in the source.
    """

    runs: tuple[Run, ...]
    groups: torch.Tensor
    perm: torch.Tensor | None = None

    @classmethod
    def uniform(cls, cols: int, size: int, where: str) -> Columns:
        """Groups of `size` columns, the last of them shorter where it does not divide."""
        return cls.of_indices(torch.arange(cols) // size, where)

    @classmethod
    def of_indices(cls, g_idx: torch.Tensor, where: str) -> Columns:
        """From the group of every column. Raises CheckpointError for groups that cannot be had exactly."""
        order = torch.argsort(g_idx, stable=True)
        sorted_groups = g_idx[order]
        found, counts = torch.unique_consecutive(sorted_groups, return_counts=True)
        sizes, cols = counts.tolist(), len(g_idx)
        perm = None if torch.equal(order, torch.arange(cols)) else order.to(torch.int32)
        even, last = sizes[0], sizes[-1]
        cut = cols - last
        if all(size == even for size in sizes):
            return cls((Run(0, cols, even),), found, perm)
        if all(size == even for size in sizes[:-1]) and last < even and cut % TILE_K == 0:
            return cls((Run(0, cut, even), Run(cut, cols, last)), found, perm)
        common = math.gcd(*sizes)
        if common < MIN_GROUP:
            raise CheckpointError(
                f"{where}: groups of {min(sizes)} to {max(sizes)} of {cols} columns share scales, and have no common "
                f"divisor of {MIN_GROUP} or more; such a weight cannot be had without quantizing it again"
            )
        return cls((Run(0, cols, common),), torch.repeat_interleave(found, counts // common), perm)

    @property
    def order(self) -> str | None:
        """A digest of the permutation, None without one."""
        return None if self.perm is None else hashlib.sha256(self.perm.numpy().tobytes()).hexdigest()

    def layout(self, rows: int, bits: int, zero: str, scale_dtype: torch.dtype) -> WeightLayout:
        """The layout of a weight of one width with these columns."""
        segments = tuple(Segment(0, rows, run.k0, run.k1, bits, run.size, zero) for run in self.runs)
        return WeightLayout(rows, self.runs[-1].k1, segments, DTYPE_NAMES[scale_dtype], self.perm is not None)

    def weight(
        self, bits: int, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, kind: str = ""
    ) -> QuantizedWeight:
        """Of codes [N, K] in the source's order of columns, scales and zeros [N, groups] in that of its groups.

        kind: of the zeros, where their dtype does not say it.
        """
        if self.perm is not None:
            codes = codes[:, self.perm.long()]
        scales, zeros = scales[:, self.groups], None if zeros is None else zeros[:, self.groups]
        blocks, first = [], 0
        for run in self.runs:
            held = slice(first, first + (run.k1 - run.k0) // run.size)
            first = held.stop
            own = None if zeros is None else zeros[:, held].contiguous()
            part = codes[:, run.k0 : run.k1].contiguous()
            blocks.append((0, run.k0, QuantizedBlock(bits, part, scales[:, held].contiguous(), own, kind)))
        return QuantizedWeight(tuple(blocks), self.perm)

    def in_words(self) -> str:
        """For reports."""
        sizes = " and ".join(str(size) for size in dict.fromkeys(run.size for run in self.runs))
        return f"groups of {sizes}" + ("" if self.perm is None else ", reordered columns")
