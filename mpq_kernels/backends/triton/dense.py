"""W itself, and y for groups that `linear.py` does not take.

Both make the weight (kinds.py) in fp32 from a scale for every element: any group, no power of two, one rounding for
each of the two operations as in reference.py.
"""

import triton
import triton.language as tl

from .linear import (
    COLUMN0,
    COLUMN_END,
    COLUMNS,
    EXPERT,
    GROUP,
    GROUPS,
    ITEM_INTS,
    KIND,
    LOCAL,
    ROW0,
    ROW_END,
    SCALES,
    TILES_LEFT,
    ZERO_FLOAT,
    ZERO_INT,
    ZERO_MIN,
    ZEROS,
    addends,
    bits_of,
    has_kind,
    num_kinds,
    only_kind,
    plane_bases,
    step_words,
    store_rows,
    zero_of,
)
from .unpack import FP16, fixed_zero, inverse_unit, operand, row_of, row_place

CODES_IN = tl.constexpr(FP16)  # no zero points here, so no need of PTX


@triton.constexpr_function
def store_step():
    """Columns of W that one step stores: 64 of fp32 need more registers than there are."""
    return 32


@triton.jit
def values_at(values, first, group, groups, mask, S: tl.constexpr):
    """Scales or zeros as fp32: [64 S, columns], or [64 S, 1] where `group` is a scalar for all of them."""
    place = row_place(S)[:, None]
    at = values + (first + group + place // 64 * groups).to(tl.int64) * 64 + place % 64
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def dense_tile(
    bases, scales, zeros, item, step, BITS: tl.constexpr, ZERO: tl.constexpr, STEP: tl.constexpr, S: tl.constexpr,
    COARSE: tl.constexpr,
):  # fmt: skip
    """W [64 S, STEP] in fp32, columns as they are stored. COARSE: scales change at multiples of STEP columns."""
    left, groups, group_size = tl.load(item + TILES_LEFT), tl.load(item + GROUPS), tl.load(item + GROUP)
    local = tl.load(item + LOCAL) + step * STEP
    words = step_words(bases, step, tl.arange(0, S)[:, None] < left, BITS, STEP, S)
    nothing = addends((0, 0), BITS, ZERO_FLOAT, S, CODES_IN)
    codes = operand(words, nothing, 0, STEP // 16, BITS, STEP // 16, S, CODES_IN, True).to(tl.float32)
    codes *= inverse_unit(CODES_IN)
    rows = (row_place(S) // 64 < left)[:, None]
    if COARSE:
        group = tl.zeros((1, 1), tl.int32) + local // group_size
        mask = rows
    else:
        k = local + tl.arange(0, STEP)[None, :]
        group = k // group_size
        mask = rows & (k < local - step * STEP + tl.load(item + COLUMNS))
    scale = values_at(scales, tl.load(item + SCALES), group, groups, mask, S)
    if ZERO == ZERO_INT or ZERO == ZERO_FLOAT or ZERO == ZERO_MIN:
        zero = values_at(zeros, tl.load(item + ZEROS), group, groups, mask, S)
    else:
        zero = fixed_zero(ZERO, BITS)
    if ZERO == ZERO_MIN:
        # The product is an fma, which no compiler joins with the sum: two roundings.
        out = tl.fma(codes, tl.broadcast_to(scale, codes.shape), tl.zeros(codes.shape, tl.float32)) + zero
    else:
        out = (codes - zero) * scale + 0.0
    return out


@triton.jit
def store_tiles(
    qweight, scales, zeros, perm, out, item, in_features, BITS: tl.constexpr, ZERO: tl.constexpr, S: tl.constexpr,
    COARSE: tl.constexpr, HAS_PERM: tl.constexpr,
):  # fmt: skip
    """What one item holds, rounded to the dtype of `out`."""
    bases = plane_bases(qweight, item, BITS, S)
    row = tl.load(item + ROW0) + row_of(S)
    column, column_end = tl.load(item + COLUMN0), tl.load(item + COLUMN_END)
    for step in range(tl.cdiv(tl.load(item + COLUMNS), store_step())):
        w = dense_tile(bases, scales, zeros, item, step, BITS, ZERO, store_step(), S, COARSE)
        k = column + step * store_step() + tl.arange(0, store_step())
        mask = (row < tl.load(item + ROW_END))[:, None] & (k < column_end)[None, :]
        if HAS_PERM:
            k = tl.load(perm + k, mask=k < column_end, other=0)
        at = out + row.to(tl.int64)[:, None] * in_features + k[None, :]
        tl.store(at, w.to(out.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_kernel(
    qweight, scales, zeros, perm, out, items, in_features, KINDS: tl.constexpr, S: tl.constexpr, COARSE: tl.constexpr,
    HAS_PERM: tl.constexpr,
):  # fmt: skip
    """out [N, K] in the original order of columns. Grid: (items,)."""
    item = items + tl.program_id(0) * ITEM_INTS
    kind = tl.load(item + KIND)
    for k in tl.static_range(num_kinds()):
        if has_kind(KINDS, k):
            if only_kind(KINDS, k) or kind == k:
                store_tiles(
                    qweight, scales, zeros, perm, out, item, in_features, bits_of(k), zero_of(k), S,
                    COARSE, HAS_PERM,
                )  # fmt: skip


@triton.jit
def slow_sums(
    x, qweight, scales, zeros, perm, item, tokens, tokens_end, x_stride, BITS: tl.constexpr, ZERO: tl.constexpr,
    S: tl.constexpr, BLOCK_M: tl.constexpr, HAS_PERM: tl.constexpr,
):  # fmt: skip
    """fp32 [64 S, BLOCK_M] of one item, products in fp32."""
    bases = plane_bases(qweight, item, BITS, S)
    column, column_end = tl.load(item + COLUMN0), tl.load(item + COLUMN_END)
    y = tl.zeros((64 * S, BLOCK_M), tl.float32)
    for tile in range(tl.cdiv(tl.load(item + COLUMNS), 64)):
        k = column + tile * 64 + tl.arange(0, 64)
        mask = (k < column_end)[:, None] & (tokens < tokens_end)[None, :]
        if HAS_PERM:
            k = tl.load(perm + k, mask=k < column_end, other=0)
        xs = tl.load(x + tokens.to(tl.int64)[None, :] * x_stride + k[:, None], mask=mask, other=0.0).to(tl.float32)
        w = dense_tile(bases, scales, zeros, item, tile, BITS, ZERO, 64, S, False)
        y = tl.dot(w, xs, y, input_precision="ieee")
    return y


@triton.jit(do_not_specialize=["num_tokens"])
def slow_kernel(
    x, qweight, scales, zeros, perm, bias, offsets, y, partial, items, num_tokens, x_stride, y_stride, rows_per_expert,
    KINDS: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr, HAS_PERM: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """As linear_kernel, for any group. Grid: (items, blocks of tokens)."""
    item = items + tl.program_id(0) * ITEM_INTS
    kind = tl.load(item + KIND)
    begin, end = 0, num_tokens
    if GROUPED:
        expert = tl.load(item + EXPERT)
        begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    for block in range(tl.program_id(1), tl.cdiv(end - begin, BLOCK_M), tl.num_programs(1)):
        tokens = begin + block * BLOCK_M + tl.arange(0, BLOCK_M)
        for k in tl.static_range(num_kinds()):
            if has_kind(KINDS, k):
                if only_kind(KINDS, k) or kind == k:
                    sums = slow_sums(
                        x, qweight, scales, zeros, perm, item, tokens, end, x_stride, bits_of(k), zero_of(k), S,
                        BLOCK_M, HAS_PERM,
                    )  # fmt: skip
                    store_rows(
                        sums, y, partial, bias, item, tokens, end, y_stride, num_tokens, rows_per_expert, S, HAS_BIAS
                    )
