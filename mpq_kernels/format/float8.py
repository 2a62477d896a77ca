"""Weights in an 8-bit float type with one scale for each row: for layers that codes of 8 bits do not suit.

    W[n, k] = fl32(qweight[n, k] * scales[n])        qweight float8_e4m3fn [N, K], scales fp32 [N]

The scale of a row is its largest magnitude over 448, the largest number of the type; that of a row of zeros is 1. Rows
keep small weights beside large ones as a grid of codes does not, which is what layers with spikes want
(https://arxiv.org/abs/2504.21553).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .layout import SizeBreakdown

FLOAT8 = "float8_e4m3fn"  # as plans name it
DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
CHUNK_WEIGHTS = 2**22  # rounded at once: an fp32 temporary of 16 MiB


@dataclass(frozen=True, slots=True)
class Float8Shape:
    """Shape of such a weight: out_features rows of in_features."""

    out_features: int
    in_features: int

    def tensor_specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor that it stores."""
        return {
            "qweight": (DTYPE, (self.out_features, self.in_features)),
            "scales": (torch.float32, (self.out_features,)),
        }

    def size(self) -> SizeBreakdown:
        """Stored bits by purpose."""
        count = self.out_features * self.in_features
        return SizeBreakdown(codes=8 * count, scales=32 * self.out_features, weights=count)


def to_float8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(qweight [N, K], scales [N]) of a finite weight [N, K], to nearest."""
    largest = weight.abs().amax(1).float()
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    # A row of subnormal numbers may have a scale of 0 in fp32; the smallest one will do.
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
    codes = torch.empty(weight.shape, dtype=DTYPE, device=weight.device)
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        codes[part] = (weight[part].float() / scales[part, None]).clamp(-LARGEST, LARGEST).to(DTYPE)
    return codes, scales


def from_float8(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """W [N, K]: the product in fp32, rounded once to dtype."""
    return (codes.float() * scales[:, None]).to(dtype)


def float8_error(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> tuple[float, float]:
    """(||W - restored W|| / ||W||, the largest difference); sums in fp64."""
    off = norm = largest = 0.0
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        wanted = weight[part].float()
        difference = from_float8(codes[part], scales[part], torch.float32) - wanted
        off += float(difference.square().sum(dtype=torch.float64))
        norm += float(wanted.square().sum(dtype=torch.float64))
        largest = max(largest, float(difference.abs().max()))
    return (off / norm) ** 0.5 if norm else 0.0, largest


def bad_float8(codes: torch.Tensor, scales: torch.Tensor) -> str | None:
    """What is wrong with the values of a stored weight, that no packer writes; None for nothing."""
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        return "scales hold NaN, Inf or numbers that are not positive"
    rows = max(1, CHUNK_WEIGHTS // codes.shape[1])
    for start in range(0, len(codes), rows):
        if bool((codes[start : start + rows].view(torch.uint8) & 0x7F == 0x7F).any()):
            return "qweight holds NaN"
    return None
