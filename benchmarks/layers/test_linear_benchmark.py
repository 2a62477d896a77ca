"""Packed linear layers against torch's own, on the CPU: one token (decode) and 256 tokens (prefill).

`make bench` prints a table and keeps JSON with machine and commit under .benchmarks; compare two runs with
`pytest-benchmark compare`. A layer whose result is wrong is not timed. The extra columns of the JSON: `weight_bytes` as
stored, and `gbytes_per_s` = weight_bytes / median seconds / 1e9, the rate at which weights were read.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpq_kernels import MixedLinear

SHAPES = ((2048, 2048), (4096, 4096))  # (out_features, in_features)
TOKENS = {"decode": 1, "prefill": 256}
WIDTHS = (2, 3, 4, 6, 8)
DENSE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _linear(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    return linear.requires_grad_(False)


def _run(benchmark: Any, layer: torch.nn.Module, x: torch.Tensor, weight_bytes: int) -> None:
    with torch.no_grad():
        benchmark(layer, x)
    benchmark.extra_info["weight_bytes"] = weight_bytes
    benchmark.extra_info["gbytes_per_s"] = weight_bytes / benchmark.stats.stats.median / 1e9
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.extra_info["threads"] = torch.get_num_threads()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("stage", TOKENS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_packed(benchmark: Any, bits: int, stage: str, shape: tuple[int, int]) -> None:
    """`MixedLinear` of one width, group 64, integer zeros, fp32 input."""
    benchmark.group = f"{stage} {shape[0]}x{shape[1]}"
    layer = MixedLinear.from_linear(_linear(shape), bits=bits, group_size=64, quantizer="rtn")
    x = torch.randn(TOKENS[stage], shape[1])
    wanted = torch.nn.functional.linear(x.double(), layer.dequantize().double())
    error = (layer(x) - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-2, f"wrong by {error:.2g}: not timed"  # far above rounding, far below a wrong weight
    _run(benchmark, layer, x, layer.layout.size().total_bytes)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("stage", TOKENS)
@pytest.mark.parametrize("name", DENSE)
def test_dense(benchmark: Any, name: str, stage: str, shape: tuple[int, int]) -> None:
    """torch.nn.functional.linear on the unpacked weight: what the packed layers are compared with."""
    benchmark.group = f"{stage} {shape[0]}x{shape[1]}"
    linear = _linear(shape, DENSE[name])
    x = torch.randn(TOKENS[stage], shape[1], dtype=DENSE[name])
    _run(benchmark, linear, x, linear.weight.nbytes)
    assert torch.isfinite(linear(x)).all()
