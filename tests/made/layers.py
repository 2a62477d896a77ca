"""Small shapes, layers and rows for the tests of benchmarks/, on the CPU."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.budget import Unit  # noqa: E402
from benchmarks.gpu.measure import Bench  # noqa: E402
from benchmarks.layers import shapes, timing  # noqa: E402
from benchmarks.layers.rows import GpuRow  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """Shapes that a test can afford, and a "model" of two of them."""
    monkeypatch.setitem(shapes.SHAPES, "one", ((128,), 256))
    monkeypatch.setitem(shapes.SHAPES, "fused", ((64, 64, 64), 128))
    monkeypatch.setitem(shapes.TOKENS, "tiny-token", (3, ("one", "fused")))


def unit(shape="one", mode="packed", width="4", tokens=(1, 3), peer="", dtype=torch.bfloat16):
    """One layer; packed ones on the first backend that serves the CPU."""
    return Unit(shape, mode, f"{mode} {width or peer}", width, dtype, tokens, peer)


def bench(peers=None, reasons=None, **words):
    """A Bench on the CPU, whose "graphs" are plain calls."""
    return Bench(CPU, 64, 0.05, 0.001, peers or {}, reasons or {}, timing.EagerRun, 2.0, least_copies=2, **words)


def row(layer, us, tokens=1, width="", shape="s", nbytes=4000, backend=None):
    """A row with these microseconds, or without a number."""
    made = GpuRow(shape, tokens, layer, "bfloat16", nbytes, 8, width=width, backend=backend)
    if us is not None:
        made.set_graph_times([us * 8] * 3, [us * 8.4] * 3, 8, 4.0)
    return made
