"""Weights that are measured: names, rows of their members, columns, and how wide each member is.

name -> ((rows of each member), K)         a fused weight has several members above each other along N
width -> "4", or "4|3|8": one width for each member
"""

from __future__ import annotations

from mpq_kernels.format.layout import WeightLayout
from mpq_kernels.plan.resolve import stack_layouts

SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "4096x4096": ((4096,), 4096),
    "14336x4096": ((14336,), 4096),
    "8192x8192": ((8192,), 8192),
    "llama-8b-q": ((4096,), 4096),
    "llama-8b-k": ((1024,), 4096),
    "llama-8b-o": ((4096,), 4096),
    "llama-8b-qkv": ((4096, 1024, 1024), 4096),
    "llama-8b-gate": ((14336,), 4096),
    "llama-8b-gate-up": ((14336, 14336), 4096),
    "llama-8b-down": ((4096,), 14336),
    "llama-8b-lm-head": ((128256,), 4096),
    "llama-70b-q": ((8192,), 8192),
    "llama-70b-k": ((1024,), 8192),
    "llama-70b-qkv": ((8192, 1024, 1024), 8192),
    "llama-70b-o": ((8192,), 8192),
    "llama-70b-gate": ((28672,), 8192),
    "llama-70b-gate-up": ((28672, 28672), 8192),
    "llama-70b-down": ((8192,), 28672),
}

# The linear layers that one token of a model passes: how many times, and which.
TOKENS: dict[str, tuple[int, tuple[str, ...]]] = {
    "llama-8b-token": (32, ("llama-8b-qkv", "llama-8b-o", "llama-8b-gate-up", "llama-8b-down")),
}


def add_shape(text: str) -> bool:
    """Whether `text` is a name of the table, or NxK, which is then added to it."""
    rows, _, cols = text.partition("x")
    if text not in SHAPES and text not in TOKENS:
        if not (rows.isdigit() and cols.isdigit() and int(rows) * int(cols)):
            return False
        SHAPES[text] = ((int(rows),), int(cols))
    return True


def parts_of(shape: str) -> tuple[str, ...]:
    """The weights behind a name: itself, or those of a token."""
    return TOKENS[shape][1] if shape in TOKENS else (shape,)


def fits(shape: str, width: str) -> bool:
    """Whether a shape has as many members as the width names, or the width is one for all."""
    count = width.count("|") + 1
    return all(count in (1, len(SHAPES[part][0])) for part in parts_of(shape))


def member_layouts(shape: str, width: str, group: int) -> list[WeightLayout] | None:
    """The layout of each member by itself; None where the members are not as many as the widths."""
    rows, cols = SHAPES[shape]
    bits = [int(part) for part in width.split("|")]
    if len(bits) not in (1, len(rows)):
        return None
    bits = bits * len(rows) if len(bits) == 1 else bits
    return [WeightLayout.uniform(n, cols, b, group, "int") for n, b in zip(rows, bits, strict=True)]


def make_layout(shape: str, width: str, group: int) -> WeightLayout | None:
    """Layout of a shape in one width ("4") or one for each member ("4|3|8"); None where the members are not as many."""
    members = member_layouts(shape, width, group)
    return None if members is None else stack_layouts(members)


def same_bytes_layout(layout: WeightLayout, bits: int, group: int) -> WeightLayout:
    """A weight of one width with as many rows of 64 as come closest to the bytes of `layout`; the same K."""
    row_block = WeightLayout.uniform(64, layout.in_features, bits, group, "int").size().total_bytes
    blocks = max(1, round(layout.size().total_bytes / row_block))
    return WeightLayout.uniform(64 * blocks, layout.in_features, bits, group, "int")
