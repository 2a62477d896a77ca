"""Kernels in Triton over the packed tensors as they are: any GPU that Triton compiles for, no C++ needed.

    work.py     which program multiplies which part of a weight: plain Python, no triton
    configs.py  how large parts are on which architecture, and where tuned choices are stored: no triton
    unpack.py   words -> operand A
    linear.py   y = x W^T for groups of 16, 32 or a multiple of 64 columns (or the whole segment)
    dense.py    W itself, and y for every other group
    launch.py   tensors -> launches
    tune.py     the measurement behind `mpq tune`

triton is imported when the first layer asks whether this backend works, not before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from ...format.lookup import lookup
from ...format.weights import PackedWeight
from .. import ops
from ..base import Backend
from ..operands import on_weight

OLDEST = (3, 6)
OLDEST_CAPABILITY = (8, 0)

LIBRARY = torch.library.Library("mpq_triton", "DEF")


def _later(name: str) -> Callable[..., torch.Tensor]:
    """launch.<name>, imported with triton at the first call."""

    def run(*args: Any) -> torch.Tensor:
        from . import launch

        made: torch.Tensor = getattr(launch, name)(*args)
        return made

    return run


@on_weight(torch.ops.mpq.embedding.default)
def _embedding(weight: PackedWeight, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return lookup(weight, ids, dtype)  # in torch: a handful of rows, for which no kernel is worth its compilation


for _name, _run, _fake in (
    ("linear", _later("linear"), ops.linear_fake),
    ("grouped_linear", _later("grouped"), ops.grouped_linear_fake),
    ("dequantize", _later("dequantize"), ops.dequantize_fake),
    ("embedding", _embedding, ops.embedding_fake),
):
    # The schema of mpq::, which stands in csrc/torch, under this name.
    LIBRARY.define(str(getattr(torch.ops.mpq, _name).default._schema).partition("::")[2])
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mpq_triton::{_name}", _fake, lib=LIBRARY)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET asks for kernels on the CPU, one operation after the other: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


@cache
def why_unavailable() -> str | None:
    """None when the kernels can run here, else the reason. Touches the devices."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return f"triton {triton.__version__} is older than {OLDEST[0]}.{OLDEST[1]} (pip install -U triton)"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device"
    if torch.version.hip is None:
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            if capability < OLDEST_CAPABILITY:
                name = torch.cuda.get_device_name(index)
                return f"cuda:{index} ({name}) has compute capability {capability[0]}.{capability[1]}; 8.0 is needed"
    return None


BACKEND = Backend(
    name="triton",
    summary="Triton kernels on packed weights; a dense product for many tokens",
    devices=("cuda", "cpu") if interpreted() else ("cuda",),
    linear=torch.ops.mpq_triton.linear.default,
    grouped=torch.ops.mpq_triton.grouped_linear.default,
    dequantize=torch.ops.mpq_triton.dequantize.default,
    embedding=torch.ops.mpq_triton.embedding.default,
    why_unavailable=why_unavailable,
)
