"""Fixtures of tests that compile: a clean start, and graphs that are traced but not compiled by Inductor."""

import pytest
import torch
from torch._dynamo.utils import counters

from mpq_kernels.hf import compiled


@pytest.fixture
def fresh():
    """Nothing compiled yet, nothing counted."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_inductor(fresh, monkeypatch):
    """Graphs are traced, once or again, and run as they are: the same but for what takes Inductor half a minute."""
    config_class = compiled.CompileConfig

    def traced(**words):
        return config_class(**words | {"backend": "aot_eager", "options": None})

    monkeypatch.setattr(compiled, "CompileConfig", traced)
