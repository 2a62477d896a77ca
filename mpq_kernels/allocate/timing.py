"""Measures the latency table of a device: every shape of a model under every choice, as the layer that would run.

Entries take turns, so that a slower minute of the machine is one for all of them; the middle of the rounds is kept. A
layer exists in so many copies that together they exceed the last-level cache, as the layers of a model do.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..dense.linears import LinearSpec
from ..errors import PlanError
from ..evaluate.speed import time_calls
from ..format.layout import WeightLayout
from ..format.random import random_weight
from ..format.weights import PackedWeight
from ..nn.linear import MixedLinear
from ..progress import Progress
from .latency import FIELDS, Key, LatencyTable
from .units import Choice, allocated

LEAST_COPIES, MOST_COPIES = 2, 256


def measure_latencies(
    linears: Sequence[LinearSpec],
    choices: Sequence[Choice],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 1,
    rounds: int = 3,
    seconds: float = 0.1,
    total_mb: float = 100,
    progress: Progress | None = None,
) -> tuple[LatencyTable, float]:
    """(table in microseconds, the largest difference between rounds of one entry, as a part of it).

    x is [tokens, K] in `dtype`. A kept choice is a dense product in that dtype. `seconds` for each entry in each round.
    A group size that does not divide K is left out for that K. On CUDA launch gaps are inside: time whole plans there
    before believing small differences. Raises PlanError for no rounds, tokens or time, and what MixedLinear raises.
    """
    if rounds < 1 or tokens < 1 or not seconds > 0:
        raise PlanError(f"rounds={rounds}, tokens={tokens}, seconds={seconds}: all must be above 0")
    keys = _keys(linears, choices)
    times: dict[Key, list[float]] = {key: [] for key in keys}
    for turn in range(rounds):
        for done, (key, choice) in enumerate(keys.items(), start=1):
            x = torch.randn(tokens, key[1], generator=torch.Generator().manual_seed(0)).to(device, dtype)
            calls = [partial(call, x) for call in _calls(key, choice, x, total_mb)]
            times[key].append(statistics.median(time_calls(calls, device, seconds)))
            if progress is not None:
                progress(turn * len(keys) + done, rounds * len(keys), "latency")
    spread = max((max(found) - min(found)) / statistics.median(found) for found in times.values())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    name = f"{where}{threads}, {str(dtype).removeprefix('torch.')}, {tokens} token{'s' * (tokens > 1)}"
    return LatencyTable(name, {key: statistics.median(found) for key, found in times.items()}), spread


def _keys(linears: Sequence[LinearSpec], choices: Sequence[Choice]) -> dict[Key, Choice]:
    """Entries of the table: every shape with every choice that can be stored for it."""
    shapes = dict.fromkeys((spec.out_features, spec.in_features) for spec in allocated(linears))
    found: dict[Key, Choice] = {}
    for rows, cols in shapes:
        for choice in choices:
            if choice.kept or choice.group_size == -1 or cols % choice.group_size == 0:
                found[rows, cols, choice.bits, -1 if choice.kept else choice.group_size] = choice
    if not found:
        sizes = sorted({choice.group_size for choice in choices})
        raise PlanError(f"no linear can be measured: none of the group sizes {sizes} divides any K ({FIELDS[1]})")
    return found


def _calls(key: Key, choice: Choice, x: torch.Tensor, total_mb: float) -> list[Callable[[torch.Tensor], Any]]:
    """The layer of one entry over copies of a random weight."""
    rows, cols = key[:2]
    generator = torch.Generator(x.device).manual_seed(0)
    if choice.kept:
        dense = torch.randn(rows, cols, device=x.device, generator=generator).to(x.dtype)
        return [partial(_dense, weight=dense.clone()) for _ in range(_copies(dense.nbytes, total_mb))]
    layout = WeightLayout.uniform(rows, cols, choice.bits, choice.group_size, choice.zero)
    weight = random_weight(layout, x.device, generator)
    layers = []
    for _ in range(_copies(layout.size().total_bytes, total_mb)):
        clone = PackedWeight(layout, **{name: tensor.clone() for name, tensor in weight.tensors().items()})
        layers.append(MixedLinear.from_packed(clone, dtype=x.dtype))
    return list(layers)


def _dense(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight)


def _copies(nbytes: int, total_mb: float) -> int:
    return min(MOST_COPIES, max(LEAST_COPIES, int(total_mb * 1e6 / nbytes) + 1))
