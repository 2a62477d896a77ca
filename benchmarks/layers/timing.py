"""How a number comes about: calls in a CUDA graph, or one by one; the error of a result; the ceilings of a device.

    one graph = every call once, each over its own copy of the weight      replayed, timed by events around each replay
    microseconds of a call = median over replays / results of the graph    launch gaps inside the graph are included

A run keeps the outputs of its calls. They are filled with NaN before the replay that is checked, so that what is
checked is what is timed, and an element that nobody wrote is found.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from mpq_kernels.evaluate.speed import read_bandwidth

Call = Callable[[torch.Tensor], torch.Tensor]
Thunk = Callable[[], torch.Tensor]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the largest output; see README.md
LEAST_REPLAYS = 10
MOST_REPLAYS = 1000


class Run(Protocol):
    """Some calls that can be repeated: `outputs` are those of the last `replay`."""

    outputs: list[torch.Tensor]

    def replay(self) -> None:
        """Make all calls once."""

    def microseconds(self, seconds: float) -> list[float]:
        """Time of each of several replays, of all calls together."""


class GraphRun:
    """Calls captured in one CUDA graph. Two rounds over the calls come before, for what they compile or allocate."""

    def __init__(self, thunks: Sequence[Thunk], warm: Sequence[int]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for index in [*warm, *warm]:
                thunks[index]()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self.outputs = [thunk() for thunk in thunks]
        torch.cuda.synchronize()

    def replay(self) -> None:
        """Make all calls once and wait."""
        self._graph.replay()
        torch.cuda.synchronize()

    def microseconds(self, seconds: float) -> list[float]:
        """Between events around each replay, after three that are not counted."""
        for _ in range(3):
            self._graph.replay()
        torch.cuda.synchronize()
        pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        end = time.perf_counter() + seconds
        while len(pairs) < LEAST_REPLAYS or (time.perf_counter() < end and len(pairs) < MOST_REPLAYS):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            self._graph.replay()
            stop.record()
            pairs.append((start, stop))
            if len(pairs) % 16 == 0:  # else the host would queue replays far beyond `seconds`
                stop.synchronize()
        torch.cuda.synchronize()
        return [1e3 * start.elapsed_time(stop) for start, stop in pairs]


class EagerRun:
    """The same without a graph, for a device that has none: dry runs and tests."""

    def __init__(self, thunks: Sequence[Thunk], warm: Sequence[int]) -> None:
        self._thunks = list(thunks)
        self.outputs = [thunk() for thunk in thunks]

    def replay(self) -> None:
        """Make all calls once, into `outputs`."""
        for output, thunk in zip(self.outputs, self._thunks, strict=True):
            output.copy_(thunk())

    def microseconds(self, seconds: float) -> list[float]:
        """Wall time of each replay."""
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < 3 or (time.perf_counter() < end and len(times) < MOST_REPLAYS):
            start = time.perf_counter_ns()
            for thunk in self._thunks:
                thunk()
            times.append((time.perf_counter_ns() - start) / 1e3)
        return times


def worst_error(outputs: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Largest |y - exact| over the largest |exact|, the worst of all outputs; NaN when any output holds one."""
    scale = {id(y): y.abs().max() for y in exact}
    errors = [(y.float() - e).abs().max() / scale[id(e)] for y, e in zip(outputs, exact, strict=True)]
    return float(torch.stack(errors).max())  # max propagates NaN


def checked_error(run: Run, exact: Sequence[torch.Tensor]) -> float:
    """`worst_error` of a replay into poisoned outputs."""
    for output in run.outputs:
        output.fill_(float("nan"))
    run.replay()
    return worst_error(run.outputs, exact)


def copies_for(nbytes: int, total_mb: float, least: int) -> int:
    """How many copies of a weight of so many bytes exceed `total_mb` million bytes, `least` at least."""
    return max(least, int(total_mb * 1e6) // nbytes + 1)


def _event_seconds(work: Callable[[], object], repetitions: int) -> list[float]:
    times = []
    for index in range(repetitions + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        if index >= 3:
            times.append(1e-3 * start.elapsed_time(stop))
    return times


def cuda_ceilings(device: torch.device, nbytes: int = 2**32, side: int = 8192) -> dict[str, float]:
    """What this device reaches, each the best of 20: copy (bytes read + written), sum in fp32, a bf16 product."""
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    copy = _event_seconds(partial(target.copy_, source), 20)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = _event_seconds(partial(torch.matmul, a, b), 20)
    return {
        "copy_gbytes_per_s": 2 * nbytes / min(copy) / 1e9,
        "copy_gbytes_per_s_median": 2 * nbytes / statistics.median(copy) / 1e9,
        "read_gbytes_per_s": read_bandwidth(device, nbytes),
        "bf16_tflops": 2 * side**3 / min(product) / 1e12,
    }
