"""What a GPU's run measures, and in which order: the most important first, because time may end a run.

plan(...) -> [Unit ...]      a unit is one layer of one shape at every number of tokens
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.layers.shapes import TOKENS, fits
from benchmarks.peers.torch import Peer

TOKEN_PASS_MAX = 16  # a pass over all layers is measured up to so many tokens
MODES = ("packed", "apart", "same bytes", "peer")
PACKED_BACKENDS = ("cuda", "triton")  # what packed layers are measured with, where the command line does not say

# The less, the sooner: a unit's place is the sum of its shape's and its layer's number.
SHAPE_RANK = {"8192x8192": 0, "llama-8b-token": 1, "llama-8b-gate-up": 2, "llama-8b-qkv": 2, "llama-8b-down": 3}
SHAPE_RANK |= {"llama-8b-lm-head": 3.5}
LAYER_RANK = {"bf16": 0, "packed 4": 0, "packed 2": 0.1, "packed 3": 0.2, "packed 8": 0.3, "packed 4|3|8": 0.3}
LAYER_RANK |= {"packed 1": 0.5, "packed 5": 0.6, "packed 6": 0.6, "packed 7": 0.6, "packed 4 fp16": 0.9}
LAYER_RANK |= {f"packed {width} triton": 0.4 for width in "4238"} | {"packed 4|3|8 triton": 0.6}
LAYER_RANK |= {"humming 4": 1, "humming 2": 1.1, "tinygemm 4": 1, "marlin 4": 1, "fp16": 1, "humming 3": 1.4}


@dataclass(frozen=True)
class Unit:
    """One layer of one shape at all numbers of tokens. mode: of MODES. dtype: of x. backend: of packed layers."""

    shape: str
    mode: str
    name: str
    width: str
    dtype: torch.dtype
    tokens: tuple[int, ...]
    peer: str = ""
    backend: str | None = None

    @property
    def key(self) -> str:
        """Unique in a plan."""
        return f"{self.shape} {self.name}"

    @property
    def rank(self) -> float:
        """Place in the plan."""
        later = 2.0 if self.name.startswith("packed") else 3.0
        if self.peer in ("gemlite", "bnb nf4", "bnb int8 (x in int8)", "torchao", "hqq"):
            later = 4.0
        shape = SHAPE_RANK.get(self.shape, 6.0 if "70b" in self.shape else 4.0)
        return shape + LAYER_RANK.get(self.name, later if self.mode in ("packed", "peer") else 0.4)


def plan(
    shapes: Sequence[str], widths: Sequence[str], tokens: Sequence[int], peers: dict[str, Peer], dtype: torch.dtype,
    backends: Sequence[str],
) -> list[Unit]:  # fmt: skip
    """Every unit, most important first. backends: of packed layers; variants are measured with the first one only."""
    units: list[Unit] = []
    for shape in shapes:
        counts = tuple(m for m in tokens if shape not in TOKENS or m <= TOKEN_PASS_MAX)
        if not counts:
            continue
        add = partial(_add, units, shape, counts)
        for peer in peers.values():
            for width in peer.widths:
                if not width or width in widths:
                    add("peer", peer.label(width), width, peer.dtype, peer.name, peer.tokens)
        for width, backend in itertools.product(widths, backends):
            if fits(shape, width):
                name = packed_name(width, backend)
                add("packed", name, width, dtype, backend=backend)
                if backend != backends[0]:
                    continue
                if "|" in width:
                    add("apart", f"{name} apart", width, dtype, backend=backend)
                    add("same bytes", f"{packed_name('4', backend)} as {width}", width, dtype, backend=backend)
                elif shape == "8192x8192" and dtype == torch.bfloat16:
                    add("packed", f"{name} fp16", width, torch.float16, backend=backend)
    return sorted(units, key=lambda unit: unit.rank)


def packed_name(width: str, backend: str) -> str:
    """Name of a packed layer in the table: the CUDA library's goes without its name."""
    return f"packed {width}" if backend == "cuda" else f"packed {width} {backend}"


def without_absent(units: Sequence[Unit], reasons: Mapping[str, str | None]) -> list[Unit]:
    """A plan in which a peer that is not available stands once, for its reason."""
    seen: set[str] = set()
    kept = []
    for unit in units:
        if not reasons.get(unit.peer):
            kept.append(unit)
        elif unit.peer not in seen:
            seen.add(unit.peer)
            kept.append(dataclasses.replace(unit, tokens=unit.tokens[:1]))
    return kept


def _add(
    units: list[Unit], shape: str, counts: tuple[int, ...], mode: str, name: str, width: str, dtype: torch.dtype,
    peer: str = "", only: tuple[int, ...] | None = None, backend: str | None = None,
) -> None:  # fmt: skip
    counts = tuple(m for m in counts if only is None or m in only)
    if counts and (shape not in TOKENS or mode in ("packed", "peer")):
        units.append(Unit(shape, mode, name, width, dtype, counts, peer, backend))
