"""Hostile tensors and tables for the operators of the CPU: an error, or the product that the arguments say."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import torch

import mpq_kernels.backends.ops  # noqa: F401  (registers the operators)
from mpq_kernels.backends.operands import packed_weight
from mpq_kernels.errors import FormatError
from mpq_kernels.format import reference, reference_int8
from mpq_kernels.format.kinds import FIXED_KINDS, ZERO_KINDS
from mpq_kernels.format.layout import Segment, WeightLayout
from mpq_kernels.format.random import random_weight
from mpq_kernels.format.weights import PackedWeight

from .campaign import Run

ISAS = torch.ops.mpq.cpu_isas().split(",")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.float64, torch.int32, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.int16)
INTS = (0, 1, -1, 2, 63, 64, 65, 128, 2**31 - 1, 2**31, 2**32, 2**32 + 3, 2**32 + 64, -(2**32), 2**33, 2**62, 2**63 - 1,
        -(2**63), 10**12)  # fmt: skip
REFUSED = (RuntimeError, TypeError, ValueError, IndexError, OverflowError, NotImplementedError)
NAMES = ("linear", "linear_int8", "grouped_linear", "grouped_linear_int8", "dequantize", "embedding")
WEIGHT = ("qweight", "scales", "zeros", "perm")


def random_layout(chance: Random, experts: int = 1) -> WeightLayout:
    """One to three row bands for each expert, each of one to three segments of columns."""
    k, kind = chance.choice((1, 63, 64, 65, 128, 172, 256, 320)), chance.choice(ZERO_KINDS)
    cuts = [0, *sorted({64 * chance.randint(1, 5) for _ in range(chance.choice((0, 0, 1, 2)))} & set(range(k))), k]
    rows = chance.choice((1, 3, 64, 70, 130))
    ends = sorted({chance.randint(1, rows) for _ in range(chance.choice((0, 0, 1, 2)))} | {rows})
    segments, zero_kinds = [], (kind, *FIXED_KINDS) if chance.random() < 0.3 else (kind,)
    for expert in range(experts):
        for n0, n1 in zip([0, *ends], ends, strict=False):
            for k0, k1 in zip(cuts, cuts[1:], strict=False):
                groups = [g for g in range(1, k1 - k0 + 1) if (k1 - k0) % g == 0]
                segments.append(Segment(expert * rows + n0, expert * rows + n1, k0, k1, chance.randint(1, 8),
                                        chance.choice(groups), chance.choice(zero_kinds)))  # fmt: skip
    dtype = chance.choice(("float16", "bfloat16", "float32"))
    return WeightLayout(experts * rows, k, tuple(segments), dtype, chance.random() < 0.3)


def good_call(chance: Random, name: str) -> dict[str, Any]:
    """The arguments of a call that is right."""
    experts = chance.choice((1, 2, 5)) if name.startswith("grouped") else 1
    layout = random_layout(chance, experts)
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    weight = random_weight(layout, "cpu", generator)
    args: dict[str, Any] = {key: getattr(weight, key) for key in WEIGHT}
    args |= {"segments": layout.segment_ints(), "out_features": layout.out_features, "in_features": layout.in_features}
    if name == "dequantize":
        return args | {"dtype": chance.choice(FLOATS)}
    tokens = chance.choice((0, 1, 2, 3, 5, 17, 33))
    if name == "embedding":
        kind = chance.choice((torch.int64, torch.int32))
        args["ids"] = torch.randint(layout.out_features, (tokens, 3), generator=generator).to(kind)
        return args | {"dtype": chance.choice(FLOATS)}
    shape = (tokens, layout.in_features)
    if experts == 1 and not name.startswith("grouped"):
        shape = chance.choice((shape, (2, tokens, layout.in_features), (layout.in_features,)))
    dtype = chance.choice(FLOATS)
    args["x"] = torch.randn(shape, generator=generator).to(dtype)
    args["bias"] = None if chance.random() < 0.5 else torch.randn(layout.out_features, generator=generator).to(dtype)
    if name.startswith("grouped"):
        ends = sorted(chance.randint(0, tokens) for _ in range(experts - 1))
        args["offsets"] = torch.tensor([0, *ends, tokens], dtype=torch.int32)
    return args


def _overlapping(chance: Random, t: torch.Tensor) -> torch.Tensor:
    return t.as_strided(t.shape, [min(1, s) for s in t.stride()]) if t.numel() else t


def _odd_pointer(chance: Random, t: torch.Tensor) -> torch.Tensor:
    """The same values one byte further in memory, or one element where torch does not allow that."""
    raw = torch.empty(t.numel() * t.element_size() + 64, dtype=torch.uint8)
    at = chance.choice((1, 2, 3, 4, 8)) * t.element_size()
    view = raw[at : at + t.numel() * t.element_size()].view(t.dtype).view(t.shape)
    return view.copy_(t)


def _short(chance: Random, t: torch.Tensor) -> torch.Tensor:
    flat = t.reshape(-1)
    return flat[: max(0, len(flat) - chance.choice((1, 64, len(flat))))].clone()


def _wide(chance: Random, t: torch.Tensor) -> torch.Tensor:
    """The same values, with others between them in memory."""
    return torch.stack((t, t.clone()), -1)[..., 0] if t.dim() else t


def _values(chance: Random, t: torch.Tensor) -> torch.Tensor:
    out = t.clone()
    if out.numel() and out.dtype in (torch.int32, torch.int64, torch.uint8):
        value = chance.choice((0, 1, 255) if out.dtype == torch.uint8 else (-1, 0, 1, 2**31 - 1, -(2**31), 64))
        out.view(-1)[chance.randrange(out.numel())] = value
    return out


TENSORS: tuple[Callable[[Random, torch.Tensor], Any], ...] = (
    lambda chance, t: t.to(chance.choice(DTYPES)),
    lambda chance, t: t.to("meta"),
    lambda chance, t: t.t() if t.dim() == 2 else t.reshape(-1, 1),
    lambda chance, t: t.reshape(1, *t.shape),
    lambda chance, t: torch.cat((t.reshape(-1), t.reshape(-1)[:1])),
    lambda chance, t: t.reshape(-1)[:0],
    lambda chance, t: t.reshape(-1)[:1].reshape(()) if t.numel() else t,
    lambda chance, t: t[:1].expand(t.shape) if t.dim() and t.shape[0] else t,
    lambda chance, t: t[:1].expand(2**20, *t.shape[1:]) if t.dim() and t.numel() else t,
    lambda chance, t: t.reshape(-1)[:1].expand(2**40) if t.numel() else t,
    lambda chance, t: t.flip(0).flip(0) if t.dim() else t,
    lambda chance, t: torch._neg_view(t) if t.is_floating_point() else t,
    lambda chance, t: t.to_sparse() if t.dim() else t,
    lambda chance, t: t.requires_grad_() if t.is_floating_point() else t,
    lambda chance, t: None,
    lambda chance, t: 3,
    _overlapping, _overlapping, _odd_pointer, _odd_pointer, _short, _wide, _wide, _values, _values, _values,
)  # fmt: skip


def _table(chance: Random, table: list[int]) -> list[int]:
    out = list(table)
    how, at = chance.randrange(6), chance.randrange(len(out))
    if how == 0:
        out[at] = chance.choice(INTS)
    elif how == 1:
        out[at] += chance.choice((1, -1, 64, -64, 2**32, 2**33))
    elif how == 2:
        del out[at]
    elif how == 3:
        del out[at // 7 * 7 : at // 7 * 7 + 7]
    elif how == 4:
        out += out[at // 7 * 7 : at // 7 * 7 + 7]
    else:
        other = chance.randrange(len(out))
        out[at], out[other] = out[other], out[at]
    return out


def mutate_call(chance: Random, args: dict[str, Any]) -> None:
    """One change of the arguments, in place."""
    key = chance.choice(list(args))
    value = args[key]
    if isinstance(value, torch.Tensor):
        args[key] = chance.choice(TENSORS)(chance, value)
    elif key == "segments" and value:
        args[key] = _table(chance, value)
    elif isinstance(value, int):
        args[key] = chance.choice((chance.choice(INTS), value + 1, value - 1, value * 2, value + 2**32))
    elif value is None:
        args[key] = args["scales"] if chance.random() < 0.5 else torch.zeros(args["in_features"] % 999)
    elif isinstance(value, torch.dtype):
        args[key] = chance.choice(DTYPES)
    if chance.random() < 0.1:  # a table that says what the sizes say, and tensors that do not
        factor = chance.choice((2, 64, 2**20, 2**32))
        args["out_features"] = args["out_features"] * factor if type(args["out_features"]) is int else 1
        if len(args["segments"]) == 7:
            args["segments"] = [args["segments"][0], args["out_features"], *args["segments"][2:]]


def check(name: str, args: dict[str, Any], y: torch.Tensor) -> None:
    """AssertionError unless y is what the arguments say; also for arguments that say nothing."""
    named = {key: args[key] for key in (*WEIGHT, "segments", "out_features", "in_features")}
    if named["zeros"] is not None and not named["zeros"].numel():
        named["zeros"] = None  # operators take none for none
    try:
        weight: PackedWeight = packed_weight(**named)
    except FormatError as error:
        raise AssertionError(f"{name} took what is no weight: {error}") from None
    if args.get("perm") is not None and not torch.equal(args["perm"].sort().values, torch.arange(len(args["perm"]))):
        return  # what such a permutation means is not said, only that nothing else is read
    if not y.numel():
        return  # right whatever else was given: a bias is not looked at
    if name == "dequantize":
        assert torch.equal(y, reference.dequantize(weight, args["dtype"]))
        return
    if name == "embedding":
        assert torch.equal(y, reference.dequantize(weight, args["dtype"])[args["ids"].long()])
        return
    x, bias = args["x"].detach().resolve_neg(), args["bias"]
    bias = None if bias is None else bias.detach().resolve_neg().reshape(-1)
    of = reference_int8 if name.endswith("int8") else reference
    linear = of.linear_int8 if of is reference_int8 else of.linear
    bound = of.accumulation_bound if of is reference_int8 else of.error_bound
    if not name.startswith("grouped"):
        assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], args["out_features"])
        assert bool(((y.double() - linear(x, weight, bias)).abs() <= bound(x, weight, bias)).all())
        return
    offsets = args["offsets"].tolist()
    rows = args["out_features"] // (len(offsets) - 1)
    assert y.shape == (len(x), rows)
    for e in range(len(offsets) - 1):
        own, part = slice(e * rows, (e + 1) * rows), slice(offsets[e], offsets[e + 1])
        wanted, near = linear(x[part], weight, bias)[:, own], bound(x[part], weight, bias)[:, own]
        assert bool(((y[part].double() - wanted).abs() <= near).all())


def prepare(folder: Path) -> Run:
    """Cases: a call of one operator on one instruction set, right or with one to three changes."""
    torch.utils.deterministic.fill_uninitialized_memory = True

    def run(chance: Random) -> str:
        torch.ops.mpq.set_cpu_isa(chance.choice(ISAS))
        name = chance.choice(NAMES)
        args = good_call(chance, name)
        changes = chance.choice((0, 1, 1, 1, 1, 2, 3))
        for _ in range(changes):
            with suppress(RuntimeError, NotImplementedError):  # of torch, which cannot make such a tensor
                mutate_call(chance, args)
        try:
            y = getattr(torch.ops.mpq, name)(**args)
        except REFUSED as error:
            assert changes, f"a right call was refused: {error}"
            return "refused"
        held = [value for value in args.values() if isinstance(value, torch.Tensor)]
        if any(tensor.is_meta for tensor in held):
            assert y.is_meta and all(tensor.is_meta for tensor in held), "a product without values has values"
            return "meta"
        if math.prod(y.shape) > 10**6:
            return "large"
        check(name, args, y)
        return "right"

    return run
