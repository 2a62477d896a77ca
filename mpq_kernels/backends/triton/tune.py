"""Measures configurations on the present device and gives the fastest for each class of tokens: `mpq tune`.

Every candidate multiplies the same weights, enough copies that they come from memory and not from a cache, inside one
CUDA graph, so that what is measured is the device and not Python.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date

import torch

from ...errors import UnsupportedError
from ...format.layout import WeightLayout
from ...format.random import random_weight
from ...format.weights import PackedWeight
from . import configs
from .configs import ALLOWED, TOKEN_CLASSES, Config

ROWS, COLUMNS, GROUP = 4096, 4096, 64
WIDTHS = (2, 4, 8)
COPY_BYTES = 256 << 20  # several times the L2 cache of any device
REPEATS = 5


def candidates(tokens: int) -> list[Config]:
    """What is tried for so many tokens."""
    blocks = [m for m in (16, 32) if m == 16 or tokens > 16]
    programs = [p for p in ALLOWED["programs_per_unit"] if p <= 8]
    rows = itertools.product(blocks, (2, 4), (3, 4, 5), programs)
    return [Config(m, warps, stages, count) for m, warps, stages, count in rows]


def tune(
    measure: Callable[[Config, int], float], say: Callable[[str], None], classes: Sequence[int] = TOKEN_CLASSES,
    source: str = "",
) -> tuple[Config, ...]:  # fmt: skip
    """The fastest configuration for each class. measure(config, tokens) -> microseconds, raising RuntimeError when it
    does not run."""
    chosen = []
    for tokens in classes:
        best: tuple[float, Config] | None = None
        for config in candidates(tokens):
            try:
                us = measure(config, tokens)
            except RuntimeError as error:
                say(f"{tokens} tokens: {config} does not run: {str(error).splitlines()[0]}")
                continue
            if best is None or us < best[0]:
                best = (us, config)
        if best is None:
            raise UnsupportedError(f"no configuration runs for {tokens} tokens on this device")
        say(f"{tokens} tokens: {best[0]:.1f} us with {best[1]}")
        chosen.append(replace(best[1], source=source or f"mpq tune, {date.today().isoformat()}, {best[0]:.1f} us"))
    return tuple(chosen)


def device_measure(device: torch.device) -> Callable[[Config, int], float]:
    """Microseconds of one product, the mean over WIDTHS, on a CUDA or ROCm device."""
    from . import launch

    weights = []
    for bits in WIDTHS:
        layout = WeightLayout.uniform(ROWS, COLUMNS, bits, GROUP)
        packed = random_weight(layout, device, torch.Generator(device).manual_seed(bits))
        copies = max(2, COPY_BYTES // packed.size().total_bytes)
        assert packed.zeros is not None
        clones = [(packed.qweight.clone(), packed.scales.clone(), packed.zeros.clone()) for _ in range(copies)]
        weights.append([PackedWeight(layout, *tensors) for tensors in clones])

    def measure(config: Config, tokens: int) -> float:
        x = torch.randn(tokens, COLUMNS, device=device).bfloat16()
        return sum(_graph_us(config, x, copies) for copies in weights) / len(weights)

    def _graph_us(config: Config, x: torch.Tensor, copies: list[PackedWeight]) -> float:
        launch.multiply(x, copies[0], None, None, config)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for packed in copies:
                launch.multiply(x, packed, None, None, config)
        graph.replay()
        times = []
        for _ in range(REPEATS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(copies))
        return sorted(times)[REPEATS // 2]

    return measure


def tune_device() -> tuple[str, Callable[[Config, int], float]]:
    """(name, measure) of the current device. Raises UnsupportedError where there is none."""
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "mpq tune measures on a GPU, and torch sees none here: run it on the machine that will run the model"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    from . import launch

    return launch.device_of(device).name, device_measure(device)


def store(name: str, rows: tuple[Config, ...]) -> None:
    """Keep the rows of one device in the user's file, beside those of others."""
    path = configs.cache_file()
    table = configs.read(path) if path.exists() else {}
    configs.write(path, table | {name: rows})
    configs.stored.cache_clear()
