"""Tensors of a packed weight -> launches. Importing this module imports triton.

Tables of work are made at the first call of a layout and kept on its device, so a layer must have run once before it
runs under graph capture. Nothing is measured here: choices come from configs.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
import triton

from ...errors import FormatError, UnsupportedError
from ...format.codes import TILE_K, TILE_N
from ...format.layout import WeightLayout, ceil_div
from ...format.weights import DTYPE_NAMES, PackedWeight
from ..operands import on_weight
from . import configs, work
from .configs import Config, Device
from .dense import dequantize_kernel, slow_kernel, store_step
from .linear import linear_kernel, reduce_kernel
from .unpack import BF16, FP16, PTX_BF16, PTX_FP16, WIDE

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
INTERPRETED = bool(triton.knobs.runtime.interpret)
SLOW_BLOCK_M = 16
REDUCE_BLOCK_M = 4
DEQUANTIZE_SUPERTILES = 4
DEQUANTIZE_PROGRAMS = 8  # for each multiprocessor: several waves of short programs, so that none waits for a long one
FIXED: dict[str, Any] = {"enable_fp_fusion": False}  # kernels say where they want one rounding for two operations


@dataclass(frozen=True)
class Tables:
    """Work of one layout on one device."""

    work: work.Work
    items: torch.Tensor  # int32 [items, work.ITEM_INTS]
    blocks: torch.Tensor  # int32 [blocks, work.BLOCK_INTS]
    supertiles: int


@on_weight(torch.ops.mpq.linear.default)
def linear(weight: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., K) fp16 or bf16 -> y (..., N), as `mpq::linear`. Raises FormatError for tensors that do not fit."""
    check_x(x, weight, bias)
    rows = x.reshape(-1, weight.layout.in_features)
    if len(rows) > configs.DENSE_ABOVE:
        dense = dequantize_packed(weight, x.dtype)
        y = torch.nn.functional.linear(rows, dense, None if bias is None else bias.to(x.dtype))
    else:
        y = multiply(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.layout.out_features)


@on_weight(torch.ops.mpq.grouped_linear.default)
def grouped(weight: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor) -> torch.Tensor:
    """x (T, K) sorted by expert -> y (T, N / experts), as `mpq::grouped_linear`. offsets are not read here."""
    check_x(x, weight, bias)
    if x.dim() != 2:
        raise FormatError(f"x must be (tokens, in_features), not {list(x.shape)}")
    if offsets.dtype != torch.int32 or offsets.dim() != 1 or len(offsets) < 2:
        raise FormatError("offsets must be int32, one-dimensional, of experts + 1 elements")
    rows, experts = weight.layout.out_features, len(offsets) - 1
    if rows % experts:
        raise FormatError(f"out_features={rows} rows do not share out among {experts} experts")
    return multiply(x, weight, bias, offsets.contiguous())


@on_weight(torch.ops.mpq.dequantize.default)
def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """W (N, K) in fp32, fp16 or bf16 and in the original order of columns, as `mpq::dequantize`."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise FormatError(f"dtype must be float32, float16 or bfloat16, not {dtype}")
    return dequantize_packed(weight, dtype)


def multiply(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, offsets: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """y [M, N / experts] for x [M, K]: one launch, and one more where blocks have several parts."""
    tokens, experts = len(x), 1 if offsets is None else len(offsets) - 1
    rows = packed.layout.out_features // experts
    wide = INTERPRETED and x.dtype == torch.bfloat16
    y = torch.empty(tokens, rows, dtype=torch.float32 if wide else x.dtype, device=x.device)
    if tokens == 0:
        return y.to(x.dtype)
    if x.stride(1) != 1:
        x = x.contiguous()
    device = device_of(x.device)
    # Which expert gets how many rows is not known here: as if they were spread evenly.
    config = config or configs.choose(device, ceil_div(tokens, experts))
    config = config if work_step(packed.layout) else replace(config, block_m=SLOW_BLOCK_M, num_warps=1)
    programs = device.units * config.programs_per_unit
    programs, most = work.share(programs, _token_blocks(tokens, experts, config.block_m), tokens, rows)
    tables = tables_for(packed.layout, experts, config.num_warps, programs, most, x.device)
    parts = tables.work.parts
    once = tokens if parts == 1 or offsets is not None else work.tokens_at_once(parts, rows, config.block_m)
    partial = torch.empty(parts if parts > 1 else 0, min(once, tokens), rows, dtype=torch.float32, device=x.device)
    for first in range(0, tokens, once):
        some = slice(first, first + once)
        _launch(x[some], y[some], partial, packed, bias, offsets, config, tables)
    return y.to(x.dtype)


def _launch(
    x: torch.Tensor, y: torch.Tensor, partial: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None,
    offsets: torch.Tensor | None, config: Config, tables: Tables,
) -> None:  # fmt: skip
    """Fill y. partial: fp32, [parts, tokens, rows of y] at least."""
    device = device_of(x.device)
    tokens, rows = y.shape
    experts = 1 if offsets is None else len(offsets) - 1
    weight = (packed.qweight, packed.scales, _or(packed.zeros, x), _or(packed.perm, x))
    inputs = (x, *weight, _or(bias, x), _or(offsets, x))
    flags = {"HAS_PERM": packed.perm is not None, "HAS_BIAS": bias is not None, "GROUPED": offsets is not None}
    place = (y, partial, tables.items, tokens, x.stride(0), y.stride(0), rows)
    grid = (tables.work.num_items, _token_blocks(tokens, experts, config.block_m))
    if tables.work.step:
        step = min(tables.work.step, configs.widest_step(device.arch, VERSION, config.block_m))
        linear_kernel[grid](
            *inputs, *place, KINDS=tables.work.kinds, STEP=step, STAGES=config.num_stages, S=tables.supertiles,
            BLOCK_M=config.block_m, NATURAL=configs.natural_columns(device.arch, VERSION),
            EVEN=_even(packed.layout, step), MATH=_math(x.dtype), num_warps=config.num_warps,
            num_stages=config.num_stages, **flags, **FIXED,
        )  # fmt: skip
    else:
        slow_kernel[grid](
            *inputs, *place, KINDS=tables.work.kinds, S=tables.supertiles, BLOCK_M=config.block_m, num_warps=4, **flags,
            **FIXED,
        )  # fmt: skip
    if tables.work.num_blocks:
        reduce_kernel[(tables.work.num_blocks, _token_blocks(tokens, experts, REDUCE_BLOCK_M))](
            partial, *inputs[-2:], y, tables.blocks, tokens, y.stride(0), rows, S=tables.supertiles,
            BLOCK_M=REDUCE_BLOCK_M, HAS_BIAS=flags["HAS_BIAS"], GROUPED=flags["GROUPED"], num_warps=4, **FIXED,
        )  # fmt: skip


def dequantize_packed(packed: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """W [N, K] in `dtype`."""
    layout, device = packed.layout, packed.qweight.device
    wide = INTERPRETED and dtype == torch.bfloat16
    shape = (layout.out_features, layout.in_features)
    out = torch.empty(shape, dtype=torch.float32 if wide else dtype, device=device)
    programs = device_of(device).units * DEQUANTIZE_PROGRAMS
    tables = tables_for(layout, 1, DEQUANTIZE_SUPERTILES, programs, programs, device)
    coarse = all(s.group_size % store_step() == 0 or s.group_size == s.cols for s in layout.segments)
    dequantize_kernel[(tables.work.num_items,)](
        packed.qweight, packed.scales, _or(packed.zeros, out), _or(packed.perm, out), out, tables.items,
        layout.in_features, KINDS=tables.work.kinds, S=tables.supertiles, COARSE=coarse,
        HAS_PERM=packed.perm is not None, num_warps=tables.supertiles, **FIXED,
    )  # fmt: skip
    return out.to(dtype)


@cache
def device_of(device: torch.device) -> Device:
    """What is asked of a device once."""
    if INTERPRETED:
        return Device("interpreter", "interpreter", 2)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = "hip:" + properties.gcnArchName.partition(":")[0]
    else:
        arch = f"cuda:{properties.major}{properties.minor}"
    return Device(properties.name, arch, properties.multi_processor_count)


@lru_cache(maxsize=4096)
def work_step(layout: WeightLayout) -> int:
    """Columns of a step of the fast kernel, 0 where only the slow one can."""
    return min(work.step_of(s) for s in layout.segments)


@lru_cache(maxsize=4096)
def tables_for(
    layout: WeightLayout, experts: int, supertiles: int, programs: int, most: int, device: torch.device
) -> Tables:
    """Tables of work (work.plan) on their device."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "a packed layer runs for the first time with so many tokens under graph capture, where its tables cannot "
            "be copied to the device: run it once before the capture"
        )
    made = work.plan(layout, supertiles, programs, experts, most)
    items = torch.tensor(made.items, dtype=torch.int32).to(device)
    return Tables(made, items, torch.tensor(made.blocks, dtype=torch.int32).to(device), supertiles)


def check_x(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> None:
    """Raise FormatError unless x and bias can be multiplied."""
    layout = packed.layout
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise FormatError("x must be float16 or bfloat16 for this backend: convert it, or run the model in one of them")
    if x.dim() < 1 or x.shape[-1] != layout.in_features:
        raise FormatError(f"x must be (..., in_features={layout.in_features}), not {list(x.shape)}")
    if bias is None:
        return
    if bias.numel() != layout.out_features or not bias.is_contiguous():
        raise FormatError(f"bias must be contiguous, with out_features={layout.out_features} elements")
    if bias.dtype not in DTYPE_NAMES or DTYPE_NAMES[bias.dtype] not in ("float32", "float16", "bfloat16"):
        raise FormatError(f"bias must be float32, float16 or bfloat16, not {bias.dtype}")


@lru_cache(maxsize=4096)
def _even(layout: WeightLayout, step: int) -> bool:
    """Whether no step reaches over the end of a segment."""
    return all(s.cols % step == 0 for s in layout.segments)


def _math(dtype: torch.dtype) -> int:
    """How operand A is computed: unpack.py."""
    if INTERPRETED:
        return FP16 if dtype == torch.float16 else WIDE
    if torch.version.hip is not None:
        return FP16 if dtype == torch.float16 else BF16
    return PTX_FP16 if dtype == torch.float16 else PTX_BF16


def _token_blocks(tokens: int, experts: int, block_m: int) -> int:
    """Programs along the tokens. Experts walk over theirs, so that twice an even share is enough of a grid."""
    return max(1, min(ceil_div(tokens, block_m), ceil_div(2 * tokens, experts * block_m)))


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """Something to pass where the kernel reads nothing."""
    return other if tensor is None else tensor


assert TILE_N == TILE_K == 64  # the kernels' index arithmetic
