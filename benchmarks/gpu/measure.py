"""The measurements of a GPU, each layer's made, checked and timed within a time. What and in which order: budget.py.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.budget import Unit
from benchmarks.layers.rows import GpuRow
from benchmarks.layers.shapes import SHAPES, TOKENS, make_layout, member_layouts, parts_of, same_bytes_layout
from benchmarks.layers.timing import TOLERANCE, Call, Run, checked_error, copies_for
from benchmarks.peers.torch import Peer, held_calls, packed_layers
from mpq_kernels.format import reference

LEAST_COPIES = 8
LEAST_CALLS = 128  # of a graph below FEW_TOKENS, so that the start of a graph weighs little
FEW_TOKENS = 256
COMPILING_BACKENDS = ("triton",)  # at the first call, into a cache on disk that a second process finds


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


@dataclass
class Bench:
    """How units are run. start_run: GraphRun, or EagerRun where there are no graphs."""

    device: torch.device
    group: int
    total_mb: float
    seconds: float  # for each of the two timings of a number
    peers: dict[str, Peer]
    reasons: dict[str, str | None]  # of peers that are not available
    start_run: Callable[..., Run]
    copy_bandwidth: float
    tflops: float | None = None
    backends: dict[str, str | None] = field(default_factory=dict)  # wanted for packed layers; why one is not available
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
        reason = self.reasons.get(unit.peer) or self._why_not(unit)
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
                packed_layers(layout, self.device, unit.dtype, unit.backend, copies, seed)
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
            compiles = self.peers[unit.peer].compiles if unit.peer else unit.backend in COMPILING_BACKENDS
            if not compiles or left <= 0:
                continue
            reason = self.reasons.get(unit.peer) or self._why_not(unit)
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
        layers = packed_layers(layout, self.device, unit.dtype, unit.backend, count)
        return list(layers), reference.dequantize(layers[0].packed), nbytes

    def _why_not(self, unit: Unit) -> str | None:
        if unit.mode != "peer":
            return None
        peer = self.peers[unit.peer]
        reasons = [
            peer.why_not_layer(sum(SHAPES[part][0]), SHAPES[part][1], unit.width) for part in parts_of(unit.shape)
        ]
        return next((reason for reason in reasons if reason), None)

    def _input(self, tokens: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(2)
        return torch.randn(tokens, cols, device=self.device, generator=generator).to(dtype)

    def _row(self, unit: Unit, tokens: int, nbytes: int = 0, copies: int = 0) -> GpuRow:
        dtype = str(unit.dtype).removeprefix("torch.")
        return GpuRow(unit.shape, tokens, unit.name, dtype, nbytes, copies, width=unit.width, backend=unit.backend)

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
