"""What runs beside the packed layers. A peer holds W in its own way and says what W it really holds.

    why_unavailable() -> reason or None                       on this machine: package, device
    why_not_layer(rows, cols, width) -> reason or None
    hold(dense fp32 [N, K], width, tokens) -> Held      quantize, pack
    call(held, tensors) -> x -> y                       over the tensors of `held`, or over clones of them

`packed_layers` makes the layers that are compared with them. Peers from other packages stand in installed.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from benchmarks.layers.timing import Call
from mpq_kernels import MixedLinear
from mpq_kernels.format.layout import WeightLayout
from mpq_kernels.format.random import random_weight
from mpq_kernels.format.weights import PackedWeight

NO_DEVICE = "no CUDA device"


@dataclass
class Held:
    """A weight as a peer stores it. wanted: the same W in fp32 [N, K]. extra: what the peer needs besides tensors."""

    tensors: tuple[torch.Tensor, ...]
    wanted: torch.Tensor
    extra: Any = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Peer:
    """Something to compare with on a CUDA device. widths: of its codes; ("",) for dense weights."""

    name: ClassVar[str]
    widths: ClassVar[tuple[str, ...]]
    dtype: torch.dtype = torch.bfloat16
    tolerance: ClassVar[float | None] = None  # of the largest output, where the method itself loses more than rounding
    tokens: ClassVar[tuple[int, ...] | None] = None  # only these, where every other number costs minutes of tuning
    compiles: ClassVar[bool] = False  # at the first call, into a cache on disk that a second process finds

    def __init__(self, group: int = 128) -> None:
        self.group = group

    def why_unavailable(self) -> str | None:
        """None when it works on this machine, else the reason."""
        return None if torch.cuda.is_available() else NO_DEVICE

    def why_not_layer(self, rows: int, cols: int, width: str) -> str | None:
        """None when it can hold such a weight, else the reason."""
        return None

    def hold(self, dense: torch.Tensor, width: str, tokens: Sequence[int]) -> Held:
        """The weight as it stores it. dense: fp32 [N, K] on the device. tokens: every M that will be asked for."""
        raise NotImplementedError

    def call(self, held: Held, tensors: tuple[torch.Tensor, ...]) -> Call:
        """x [M, K] -> y [M, N] over these tensors."""
        raise NotImplementedError

    def label(self, width: str) -> str:
        """Name of a layer in the table."""
        return f"{self.name} {width}".strip()


class Dense(Peer):
    """torch.nn.functional.linear on a 16-bit weight: cuBLAS."""

    widths = ("",)

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.name = name  # type: ignore[misc]

    def hold(self, dense: torch.Tensor, width: str, tokens: Sequence[int]) -> Held:
        """A cast."""
        weight = dense.to(self.dtype)
        return Held((weight,), weight.float())

    def call(self, held: Held, tensors: tuple[torch.Tensor, ...]) -> Call:
        """y = x @ W.T"""
        (weight,) = tensors
        return lambda x: torch.nn.functional.linear(x, weight)


class Tinygemm(Peer):
    """torch's own 4-bit operator: W = (code - 8) * scale + zero, scale and zero in bf16, bf16 x."""

    name = "tinygemm"
    widths = ("4",)
    INNER_K_TILES = 8

    def why_not_layer(self, rows: int, cols: int, width: str) -> str | None:
        """Its packing wants K in steps of 16 * 8 and N in steps of 8."""
        if cols % (16 * self.INNER_K_TILES) or rows % 8 or self.group not in (32, 64, 128, 256):
            return f"{rows} x {cols}, group {self.group}: wants N % 8 == 0, K % 128 == 0, group 32 to 256"
        return None

    def hold(self, dense: torch.Tensor, width: str, tokens: Sequence[int]) -> Held:
        """Round to nearest around 8."""
        codes, scale = symmetric_codes(dense, 4, self.group, torch.bfloat16)
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()  # even k in the high half of a byte
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, self.INNER_K_TILES)
        table = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous()  # [K/g, N, 2]
        return Held((packed, table), symmetric_values(codes, scale, 4, self.group))

    def call(self, held: Held, tensors: tuple[torch.Tensor, ...]) -> Call:
        """The operator."""
        packed, table = tensors
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, self.group, table)


def symmetric_codes(
    dense: torch.Tensor, bits: int, group: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [N, K] around 2**(bits - 1), scales [N, K/g] in dtype) of a dense weight, rounded to nearest."""
    rows, cols = dense.shape
    half = 1 << (bits - 1)
    grouped = dense.view(rows, cols // group, group)
    scale = (grouped.abs().amax(-1, keepdim=True) / max(half - 1, 0.5)).clamp_min(1e-7).to(dtype)
    codes = (grouped / scale.float() + half).round_().clamp_(0, 2 * half - 1)
    return codes.to(torch.uint8).view(rows, cols), scale.view(rows, cols // group)


def symmetric_values(codes: torch.Tensor, scale: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """W in fp32 that `symmetric_codes` stands for."""
    rows, cols = codes.shape
    centred = codes.view(rows, cols // group, group).float() - (1 << (bits - 1))
    return (centred * scale.float().unsqueeze(-1)).view(rows, cols)


def held_calls(peer: Peer, held: Held, copies: int) -> list[Call]:
    """A call over the tensors of `held`, and over each of copies - 1 clones of them."""
    calls = [peer.call(held, held.tensors)]
    for _ in range(copies - 1):
        calls.append(peer.call(held, tuple(tensor.clone() for tensor in held.tensors)))
    return calls


def packed_layers(
    layout: WeightLayout, device: torch.device, dtype: torch.dtype, backend: str | None, copies: int, seed: int = 0
) -> list[MixedLinear]:
    """A packed layer of random codes, and copies of it with their own tensors."""
    weight = random_weight(layout, device, torch.Generator(device).manual_seed(seed))
    layers = [MixedLinear.from_packed(weight, dtype=dtype, backend=backend)]
    for _ in range(copies - 1):
        clone = PackedWeight(layout, **{name: tensor.clone() for name, tensor in weight.tensors().items()})
        layers.append(MixedLinear.from_packed(clone, dtype=dtype, backend=backend))
    return layers


# The CPU's table: dense layers, and torch's 4-bit operator there.


def dense_calls(weight: torch.Tensor, copies: int) -> list[Call]:
    """torch.nn.functional.linear over copies of a dense weight."""

    def call(copy: torch.Tensor) -> Call:
        return lambda x: torch.nn.functional.linear(x, copy)

    return [call(weight.clone()) for _ in range(copies)]


def int4_calls(dense: torch.Tensor, group: int, copies: int) -> tuple[list[Call], torch.Tensor]:
    """(torch's int4 CPU operator over copies, the W it means) for codes made from a dense weight [N, K]."""
    codes, scale = symmetric_codes(dense, 4, group, torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    table = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous()  # [K/g, N, 2]

    def call(copy: torch.Tensor) -> Call:
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, copy, group, table)

    return [call(packed.clone()) for _ in range(copies)], symmetric_values(codes, scale, 4, group)
