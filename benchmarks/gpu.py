"""The measurements of a GPU: what is measured, in which order, within which time.

    plan(args) -> [Unit ...]      most important first; a unit is one layer of one shape at every number of tokens
    load_of(unit) -> Load         the calls of one graph, and the W that each multiplies by
    Bench.run(units)              one unit after the other until the time is up; JSON after each

A unit that fails leaves a row with its reason. One that breaks the CUDA context (an illegal address, say) does too, and
the process starts itself again for the units that are left: `Broken`.
"""

from __future__ import annotations

import dataclasses
import itertools
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.peers import Peer, held_calls, packed_layers
from benchmarks.rows import GpuRow
from benchmarks.shapes import SHAPES, TOKENS, fits, make_layout, member_layouts, parts_of, same_bytes_layout
from benchmarks.timing import TOLERANCE, Call, Run, checked_error, copies_for
from mpq_kernels import reference

LEAST_COPIES = 8
LEAST_CALLS = 32  # of a graph below FEW_TOKENS, so that the start of a graph weighs little
FEW_TOKENS = 256
TOKEN_PASS_MAX = 16  # a pass over all layers is measured up to so many tokens
MODES = ("packed", "apart", "same bytes", "peer")

# The less, the sooner: a unit's place is the sum of its shape's and its layer's number.
SHAPE_RANK = {"8192x8192": 0, "llama-8b-token": 1, "llama-8b-gate-up": 2, "llama-8b-qkv": 2, "llama-8b-down": 3}
LAYER_RANK = {"bf16": 0, "packed 4": 0, "packed 2": 0.1, "packed 3": 0.2, "packed 8": 0.3, "packed 4|3|8": 0.3}
LAYER_RANK |= {"packed 1": 0.5, "packed 5": 0.6, "packed 6": 0.6, "packed 7": 0.6, "packed 4 fp16": 0.9}
LAYER_RANK |= {"humming 4": 1, "humming 2": 1.1, "tinygemm 4": 1, "marlin 4": 1, "fp16": 1, "humming 3": 1.4}


@dataclass(frozen=True)
class Unit:
    """One layer of one shape at all numbers of tokens. mode: of MODES. dtype: of x."""

    shape: str
    mode: str
    name: str
    width: str
    dtype: torch.dtype
    tokens: tuple[int, ...]
    peer: str = ""

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


@dataclass
class Load:
    """What one graph runs: calls[i] multiplies by weights[which[i]], fp32 [N, K]. results: how many it makes."""

    calls: list[Call]
    weights: list[torch.Tensor]
    which: list[int]
    weight_bytes: int
    copies: int
    results: int


class Broken(RuntimeError):
    """The CUDA context is lost; nothing more can run in this process."""


class OutOfTime(Exception):
    """A unit took longer than it may."""


def plan(
    shapes: Sequence[str], widths: Sequence[str], tokens: Sequence[int], peers: dict[str, Peer], dtype: torch.dtype
) -> list[Unit]:
    """Every unit, most important first."""
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
        for width in widths:
            if fits(shape, width):
                add("packed", f"packed {width}", width, dtype)
                if "|" in width:
                    add("apart", f"packed {width} apart", width, dtype)
                    add("same bytes", f"packed 4 as {width}", width, dtype)
                elif shape == "8192x8192" and dtype == torch.bfloat16:
                    add("packed", f"packed {width} fp16", width, torch.float16)
    return sorted(units, key=lambda unit: unit.rank)


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
    peer: str = "", only: tuple[int, ...] | None = None,
) -> None:  # fmt: skip
    counts = tuple(m for m in counts if only is None or m in only)
    if counts and (shape not in TOKENS or mode in ("packed", "peer")):
        units.append(Unit(shape, mode, name, width, dtype, counts, peer))


@dataclass
class Bench:
    """How units are run. start_run: GraphRun, or EagerRun where there are no graphs."""

    device: torch.device
    group: int
    total_mb: float
    seconds: float  # for each of the two timings of a number
    backend: str | None
    peers: dict[str, Peer]
    reasons: dict[str, str | None]  # of peers that are not available
    start_run: Callable[..., Run]
    copy_bandwidth: float
    tflops: float | None = None
    least_copies: int = LEAST_COPIES
    clock: Callable[[], float] = time.monotonic
    deadline: float = float("inf")

    def run(
        self, units: Sequence[Unit], unit_seconds: float, after: Callable[[Unit, list[GpuRow]], None]
    ) -> list[Unit]:
        """Run units in order; `after` is called with the rows of each. Returns those that found no time.

        Raises Broken, after `after`, when the CUDA context is lost.
        """
        for index, unit in enumerate(units):
            left = self.deadline - self.clock()
            if left <= 0:
                return list(units[index:])
            rows: list[GpuRow] = []
            try:
                with time_limit(min(unit_seconds, left)):
                    for row in self.rows(unit):
                        rows.append(row)
            except OutOfTime:
                rows += self._without(unit, rows, f"stopped after {min(unit_seconds, left):.0f} s")
            except Exception as error:  # a foreign package may raise anything; the row keeps what it said
                rows += self._without(unit, rows, first_line(error))
            self._free()
            after(unit, rows)
            self._check_context(unit)
        return []

    def rows(self, unit: Unit) -> Iterator[GpuRow]:
        """One row for each number of tokens, timed or with a reason."""
        reason = self.reasons.get(unit.peer) or self._refusal(unit)
        if reason:
            yield from self._without(unit, [], reason)
            return
        load = self.load_of(unit)
        for tokens in unit.tokens:
            if self.clock() > self.deadline:
                return
            yield self.measure(unit, load, tokens)

    def measure(self, unit: Unit, load: Load, tokens: int) -> GpuRow:
        """Check what one graph computes, then time it twice."""
        row = self._row(unit, tokens, load.weight_bytes, load.copies)
        xs = {w.shape[1]: self._input(tokens, w.shape[1], unit.dtype) for w in load.weights}
        exact = [xs[w.shape[1]].float() @ w.T for w in load.weights]
        rounds = -(-LEAST_CALLS // len(load.calls)) if tokens < FEW_TOKENS else 1
        order = list(range(len(load.calls))) * rounds
        thunks = [partial(load.calls[i], xs[load.weights[load.which[i]].shape[1]]) for i in order]
        warm = [load.which.index(kind) for kind in range(len(load.weights))]
        try:
            run = self.start_run(thunks, warm)
        except OutOfTime:
            raise
        except Exception as error:  # as in `run`; another number of tokens may work
            row.reason = first_line(error)
            return row
        row.error = checked_error(run, [exact[load.which[i]] for i in order])
        allowed = (self.peers[unit.peer].tolerance if unit.peer else None) or TOLERANCE[unit.dtype]
        if not row.error <= allowed:  # NaN is not
            row.reason = f"wrong by {row.error:.2g} of the largest output: not timed"
            return row
        first, again = run.microseconds(self.seconds), run.microseconds(self.seconds)
        row.set_graph_times(first, again, load.results * rounds, self.copy_bandwidth)
        if self.tflops:
            row.arithmetic_us = sum(2 * tokens * load.weights[k].numel() for k in load.which) / load.results
            row.arithmetic_us /= self.tflops * 1e6
        return row

    def load_of(self, unit: Unit) -> Load:
        """Weights and calls of a unit."""
        if unit.shape in TOKENS:
            repeats, parts = TOKENS[unit.shape]
            pieces = [self._copies(dataclasses.replace(unit, shape=part), repeats) for part in parts]
            return Load(
                [calls[layer] for layer in range(repeats) for calls, _, _ in pieces],
                [wanted for _, wanted, _ in pieces],
                list(range(len(parts))) * repeats,
                repeats * sum(nbytes for _, _, nbytes in pieces), copies=1, results=1,
            )  # fmt: skip
        if unit.mode == "apart":
            layouts = member_layouts(unit.shape, unit.width, self.group)
            assert layouts is not None
            nbytes = sum(layout.size().total_bytes for layout in layouts)
            copies = copies_for(nbytes, self.total_mb, self.least_copies)
            members = [
                packed_layers(layout, self.device, unit.dtype, self.backend, copies, seed)
                for seed, layout in enumerate(layouts)
            ]
            weights = [reference.dequantize(layers[0].packed) for layers in members]
            each = [call for layers in zip(*members, strict=True) for call in layers]  # one copy after the other
            return Load(list(each), weights, list(range(len(members))) * copies, nbytes, copies, copies)
        calls, wanted, nbytes = self._copies(unit, None)
        return Load(calls, [wanted], [0] * len(calls), nbytes, len(calls), len(calls))

    def warm(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, str]]:
        """Let every unit compile what it needs; (unit, what happened) of each that does so at its first call."""
        for unit in units:
            left = self.deadline - self.clock()
            if not unit.peer or not self.peers[unit.peer].compiles or left <= 0:
                continue
            reason = self.reasons.get(unit.peer) or self._refusal(unit)
            try:
                if reason is None:
                    with time_limit(left):
                        load = self.load_of(unit)
                        for kind, tokens in itertools.product(range(len(load.weights)), unit.tokens):
                            x = self._input(tokens, load.weights[kind].shape[1], unit.dtype)
                            load.calls[load.which.index(kind)](x)
                        torch.cuda.synchronize()
            except Exception as error:  # as in `run`
                reason = first_line(error)
            self._free()
            yield unit, reason or "ready"

    def _copies(self, unit: Unit, copies: int | None) -> tuple[list[Call], torch.Tensor, int]:
        """(calls over that many copies, W, bytes of one); None: as many copies as it takes to come from memory."""
        if unit.mode == "peer":
            peer = self.peers[unit.peer]
            rows, cols = SHAPES[unit.shape]
            generator = torch.Generator(self.device).manual_seed(1)
            dense = torch.randn(sum(rows), cols, device=self.device, generator=generator) * cols**-0.5
            held = peer.hold(dense, unit.width, unit.tokens)
            count = copies or copies_for(held.weight_bytes, self.total_mb, self.least_copies)
            return held_calls(peer, held, count), held.wanted, held.weight_bytes
        layout = make_layout(unit.shape, unit.width, self.group)
        assert layout is not None
        if unit.mode == "same bytes":
            layout = same_bytes_layout(layout, 4, self.group)
        nbytes = layout.size().total_bytes
        count = copies or copies_for(nbytes, self.total_mb, self.least_copies)
        layers = packed_layers(layout, self.device, unit.dtype, self.backend, count)
        return list(layers), reference.dequantize(layers[0].packed), nbytes

    def _refusal(self, unit: Unit) -> str | None:
        if unit.mode != "peer":
            return None
        peer = self.peers[unit.peer]
        reasons = [peer.refuses(sum(SHAPES[part][0]), SHAPES[part][1], unit.width) for part in parts_of(unit.shape)]
        return next((reason for reason in reasons if reason), None)

    def _input(self, tokens: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(2)
        return torch.randn(tokens, cols, device=self.device, generator=generator).to(dtype)

    def _row(self, unit: Unit, tokens: int, nbytes: int = 0, copies: int = 0) -> GpuRow:
        dtype = str(unit.dtype).removeprefix("torch.")
        return GpuRow(unit.shape, tokens, unit.name, dtype, nbytes, copies, width=unit.width)

    def _without(self, unit: Unit, done: Sequence[GpuRow], reason: str) -> list[GpuRow]:
        """Rows with a reason for the numbers of tokens that have none yet."""
        seen = {row.tokens for row in done}
        return [
            dataclasses.replace(self._row(unit, tokens), reason=reason) for tokens in unit.tokens if tokens not in seen
        ]

    def _free(self) -> None:
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # of a lost context; _check_context says so
                torch.cuda.empty_cache()

    def _check_context(self, unit: Unit) -> None:
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.ones(1, device=self.device).item()
        except RuntimeError as error:
            raise Broken(f"{unit.key}: {first_line(error)}") from error


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in this thread, the main one, after so many seconds."""

    def stop(number: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first_line(error: BaseException) -> str:
    """What went wrong in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
