"""y[M, N] = x[M, K] W[N, K]^T + bias for groups of 16, 32 or a multiple of 64 columns, or one group for each segment.

A program takes one item of the table (work.py): S supertiles of rows times a range of columns of one segment, for one
block of tokens. In each step it multiplies STEP columns, then adds the sums times the scales to y:

    y[row][token] += scale * sum((code - zero) x)                          none, half, int: exact in operand A
    y[row][token] += scale * (sum(code x) - zero * sum(x))                 float
    y[row][token] += scale * sum(code x);  += zero * sum(x)                min

so that one-hot x gives fl32(fl32(code - zero) * scale), or fl32(fl32(code * scale) + zero), bit for bit. The compiler
keeps the words and x of `configs.stages` steps on their way to shared memory. Scales and zeros wait in registers, a
step ahead: no asynchronous copy takes two bytes, and a load of bytes inside the loop makes the compiler give operand A
of mma.sync another order. Operand A is decoded and multiplied 32 columns at a time: a whole step of it would take the
registers of a third program. Where an item is not alone in its block it writes its sums apart, and `reduce` adds them
in the order of the columns: no atomics, the same bits every time.

Experts: an item belongs to one, whose tokens are the rows offsets[e] .. offsets[e + 1] of x.
"""

import triton
import triton.language as tl

from ...format.codes import FORMATS
from ...format.kinds import ZERO_KINDS
from . import configs, work
from .unpack import (
    WIDE,
    column_of,
    fixed_zero,
    in_operand,
    inverse_unit,
    load_words,
    operand,
    plane_widths,
    row_of,
    row_place,
    split4,
    unit,
    word_of,
)

ZERO_INT = tl.constexpr(ZERO_KINDS.index("int"))
ZERO_FLOAT = tl.constexpr(ZERO_KINDS.index("float"))
ZERO_MIN = tl.constexpr(ZERO_KINDS.index("min"))
IN_FP32 = tl.constexpr(WIDE)
stages = triton.constexpr_function(configs.stages)

KIND, ROW0, ROW_END = tl.constexpr(work.KIND), tl.constexpr(work.ROW0), tl.constexpr(work.ROW_END)
COLUMN0, COLUMN_END = tl.constexpr(work.COLUMN0), tl.constexpr(work.COLUMN_END)
LOCAL, COLUMNS, PLANE0 = tl.constexpr(work.LOCAL), tl.constexpr(work.COLUMNS), tl.constexpr(work.PLANE0)
TILE_STRIDE, TILES_LEFT = tl.constexpr(work.TILE_STRIDE), tl.constexpr(work.TILES_LEFT)
SCALES, ZEROS = tl.constexpr(work.SCALES), tl.constexpr(work.ZEROS)
GROUPS, GROUP = tl.constexpr(work.GROUPS), tl.constexpr(work.GROUP)
PART, PARTS, EXPERT = tl.constexpr(work.PART), tl.constexpr(work.PARTS), tl.constexpr(work.EXPERT)
ITEM_INTS = tl.constexpr(work.ITEM_INTS)
BLOCK_ROW0, BLOCK_ROW_END = tl.constexpr(work.BLOCK_ROW0), tl.constexpr(work.BLOCK_ROW_END)
BLOCK_PARTS, BLOCK_EXPERT = tl.constexpr(work.BLOCK_PARTS), tl.constexpr(work.BLOCK_EXPERT)
BLOCK_INTS = tl.constexpr(work.BLOCK_INTS)


@triton.constexpr_function
def num_kinds():
    """Numbers that work.kind_of gives."""
    return len(FORMATS) * work.KINDS


@triton.constexpr_function
def bits_of(kind):
    """Width of a kind."""
    return kind // work.KINDS + 1


@triton.constexpr_function
def zero_of(kind):
    """Zero kind of a kind."""
    return kind % work.KINDS


@triton.constexpr_function
def has_kind(kinds, kind):
    """Whether a weight has segments of a kind."""
    return kinds >> kind & 1 == 1


@triton.constexpr_function
def only_kind(kinds, kind):
    """Whether a weight has segments of no other kind."""
    return kinds == 1 << kind


@triton.jit
def plane_bases(qweight, item, BITS: tl.constexpr, S: tl.constexpr):
    """Pointers [S, 1] to the item's first supertile of each row tile, for each plane."""
    out = ()
    WIDTHS: tl.constexpr = plane_widths(BITS)
    s = tl.arange(0, S)[:, None]
    stride = tl.load(item + TILE_STRIDE)
    for p in tl.static_range(len(WIDTHS)):
        first = tl.load(item + PLANE0 + p)
        out = out + (qweight + (first + s * stride * WIDTHS[p]).to(tl.int64) * 128,)
    return out


@triton.jit
def step_words(bases, step, mask, BITS: tl.constexpr, STEP: tl.constexpr, S: tl.constexpr):
    """Words of one step: 64 columns, or a part of them."""
    STEPS_PER_TILE: tl.constexpr = 64 // STEP
    return load_words(bases, step // STEPS_PER_TILE, step % STEPS_PER_TILE * (STEP // 16), mask, BITS, STEP // 16, S)


@triton.jit
def next_group(group, left, group_size, STEP: tl.constexpr):
    """(group of scales, columns left of it) of the next step, without a division."""
    left -= STEP
    ends = left <= 0
    return tl.where(ends, group + 1, group), tl.where(ends, left + group_size, left)


@triton.jit
def step_zeros(zeros, group, item, mask, ZERO: tl.constexpr, S: tl.constexpr):
    """Integer zeros of one step as [S, 128] for each row half, in the order of words."""
    if ZERO == ZERO_INT:
        s = tl.arange(0, S)[:, None]
        j = tl.arange(0, 128)[None, :]
        row = tl.load(item + ZEROS) + group + tl.load(item + GROUPS) * s
        at = zeros + row.to(tl.int64) * 64 + j // 16 * 8 + j % 4
        m = tl.broadcast_to(mask, (S, 128))
        out = (tl.load(at, mask=m, other=0), tl.load(at + 4, mask=m, other=0))
    else:
        out = (0, 0)
    return out


@triton.jit
def addends(raw, BITS: tl.constexpr, ZERO: tl.constexpr, S: tl.constexpr, MATH: tl.constexpr):
    """Words of -zero * unit for `operand`: eight [S, 8, 4]."""
    if ZERO == ZERO_INT:
        low = split4(word_of(raw[0].to(tl.float32) * -unit(MATH), MATH), S)
        high = split4(word_of(raw[1].to(tl.float32) * -unit(MATH), MATH), S)
        out = (low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3])
    else:
        value: tl.constexpr = -fixed_zero(ZERO, BITS) * unit(MATH) if in_operand(ZERO) else 0.0
        z = word_of(tl.full((S, 8, 4), value, tl.float32), MATH)
        out = (z, z, z, z, z, z, z, z)
    return out


@triton.jit
def row_values(values, first, group, groups, mask, S: tl.constexpr):
    """Scales, float zeros or mins of one group, [64 S], in their own dtype."""
    place = row_place(S)
    at = values + (first + group + place // 64 * groups).to(tl.int64) * 64 + place % 64
    return tl.load(at, mask=mask, other=0.0)


@triton.constexpr_function
def columns_at_once(step):
    """Columns that are decoded and multiplied at a time."""
    return min(step, 32)


@triton.jit
def tokens_at(
    x, perm, column, column_end, tokens, tokens_end, x_stride, STEP: tl.constexpr, NATURAL: tl.constexpr,
    HAS_PERM: tl.constexpr, EVEN: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """x of one step, a [columns_at_once, tokens] for each part of it, columns in the order of `operand`."""
    WIDTH: tl.constexpr = columns_at_once(STEP)
    out = ()
    for part in tl.static_range(STEP // WIDTH):
        k = column + part * WIDTH + column_of(WIDTH // 16, NATURAL)
        mask = (tokens < tokens_end)[None, :]
        if not EVEN:
            mask = mask & (k < column_end)[:, None]
        if HAS_PERM:
            k = tl.load(perm + k, mask=k < column_end, other=0)
        v = tl.load(x + tokens.to(tl.int64)[None, :] * x_stride + k[:, None], mask=mask, other=0.0)
        if MATH == IN_FP32:
            v = v.to(tl.float32)
        out = out + (v,)
    return out


@triton.jit
def product(
    words, raw, xs, BITS: tl.constexpr, ZERO: tl.constexpr, STEP: tl.constexpr, S: tl.constexpr, MATH: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """fp32 [64 S, tokens]: operand A of one step times x."""
    zeros = addends(raw, BITS, ZERO, S, MATH)
    CHUNKS: tl.constexpr = columns_at_once(STEP) // 16
    sums = tl.dot(operand(words, zeros, 0, CHUNKS, BITS, STEP // 16, S, MATH, NATURAL), xs[0], input_precision="ieee")
    for part in tl.static_range(1, len(xs)):
        a = operand(words, zeros, part * CHUNKS, CHUNKS, BITS, STEP // 16, S, MATH, NATURAL)
        sums = tl.dot(a, xs[part], sums, input_precision="ieee")
    return sums


@triton.jit
def sum_of_tokens(xs):
    """fp32 [tokens]: x of one step, added up."""
    total = tl.sum(xs[0].to(tl.float32), axis=0)
    for part in tl.static_range(1, len(xs)):
        total += tl.sum(xs[part].to(tl.float32), axis=0)
    return total


@triton.jit
def item_sums(
    x, qweight, scales, zeros, perm, item, tokens, tokens_end, x_stride, BITS: tl.constexpr, ZERO: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr, NATURAL: tl.constexpr,
    HAS_PERM: tl.constexpr, EVEN: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """fp32 [64 S, BLOCK_M]: the item's rows times tokens."""
    local, group_size, groups = tl.load(item + LOCAL), tl.load(item + GROUP), tl.load(item + GROUPS)
    # Items begin at a multiple of 64 columns: 16-byte loads of x.
    column, column_end = tl.multiple_of(tl.load(item + COLUMN0), 64), tl.load(item + COLUMN_END)
    left, first_scale, first_zero = tl.load(item + TILES_LEFT), tl.load(item + SCALES), tl.load(item + ZEROS)
    steps = tl.cdiv(tl.load(item + COLUMNS), STEP)
    mask = tl.arange(0, S)[:, None] < left
    row_mask = row_place(S) // 64 < left
    bases = plane_bases(qweight, item, BITS, S)
    y = tl.zeros((64 * S, BLOCK_M), tl.float32)

    group = local // group_size
    group_left = group_size - local % group_size
    scale = row_values(scales, first_scale, group, groups, row_mask, S)
    raw = step_zeros(zeros, group, item, mask, ZERO, S)
    if not in_operand(ZERO):
        added = row_values(zeros, first_zero, group, groups, row_mask, S)
    if not NATURAL:
        xs = tokens_at(x, perm, column, column_end, tokens, tokens_end, x_stride, STEP, NATURAL, HAS_PERM, EVEN, MATH)
    for step in tl.range(steps, num_stages=stages(STAGES, BITS, STEP)):
        words = step_words(bases, step, mask, BITS, STEP, S)
        if NATURAL:
            xs = tokens_at(
                x, perm, column + step * STEP, column_end, tokens, tokens_end, x_stride, STEP, NATURAL, HAS_PERM, EVEN,
                MATH,
            )  # fmt: skip
        sums = product(words, raw, xs, BITS, ZERO, STEP, S, MATH, NATURAL)
        if not in_operand(ZERO):
            zero = tl.broadcast_to(added.to(tl.float32)[:, None], y.shape)
            sum_x = tl.broadcast_to(sum_of_tokens(xs)[None, :], y.shape)
        if ZERO == ZERO_FLOAT:
            sums = tl.fma(zero * -unit(MATH), sum_x, sums)
        # The power of two joins the scale: exact below 2^119.
        factor = scale.to(tl.float32) * inverse_unit(MATH)
        y = tl.fma(tl.broadcast_to(factor[:, None], y.shape), sums, y)
        if ZERO == ZERO_MIN:
            y = tl.fma(zero, sum_x, y)
        # What the next step needs in registers.
        group, group_left = next_group(group, group_left, group_size, STEP)
        rest = steps - 1 - step
        still = tl.minimum(left, rest * S)
        scale = row_values(scales, first_scale, group, groups, row_place(S) // 64 < still, S)
        if not in_operand(ZERO):
            added = row_values(zeros, first_zero, group, groups, row_place(S) // 64 < still, S)
        raw = step_zeros(zeros, group, item, tl.arange(0, S)[:, None] < still, ZERO, S)
        if not NATURAL:
            xs = tokens_at(
                x, perm, column + step * STEP + STEP, column_end, tokens, tl.where(rest > 0, tokens_end, 0), x_stride,
                STEP, NATURAL, HAS_PERM, EVEN, MATH,
            )  # fmt: skip
    return y


@triton.jit
def store_rows(
    sums, y, partial, bias, item, tokens, tokens_end, y_stride, num_tokens, rows_per_expert, S: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Sums [64 S, tokens] to y, rounded once, or to their place among the partial sums."""
    row = tl.load(item + ROW0) + row_of(S)
    mask = (row < tl.load(item + ROW_END))[:, None] & (tokens < tokens_end)[None, :]
    column = row - tl.load(item + EXPERT) * rows_per_expert
    if tl.load(item + PARTS) > 1:
        line = tl.load(item + PART).to(tl.int64) * num_tokens + tokens
        tl.store(partial + line[None, :] * rows_per_expert + column[:, None], sums, mask=mask)
    else:
        if HAS_BIAS:
            sums += tl.load(bias + row, mask=row < tl.load(item + ROW_END), other=0.0).to(tl.float32)[:, None]
        at = y + tokens.to(tl.int64)[None, :] * y_stride + column[:, None]
        tl.store(at, sums.to(y.dtype.element_ty), mask=mask)


@triton.jit
def one_block(
    x, qweight, scales, zeros, perm, bias, y, partial, item, tokens, tokens_end, num_tokens, x_stride, y_stride,
    rows_per_expert, KINDS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, S: tl.constexpr,
    BLOCK_M: tl.constexpr, NATURAL: tl.constexpr, HAS_PERM: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """One item for one block of tokens: the code is chosen by its width and kind of zeros."""
    kind = tl.load(item + KIND)
    for k in tl.static_range(num_kinds()):
        if has_kind(KINDS, k):
            if only_kind(KINDS, k) or kind == k:
                sums = item_sums(
                    x, qweight, scales, zeros, perm, item, tokens, tokens_end, x_stride, bits_of(k),
                    zero_of(k), STEP, STAGES, S, BLOCK_M, NATURAL, HAS_PERM, EVEN, MATH,
                )  # fmt: skip
                store_rows(
                    sums, y, partial, bias, item, tokens, tokens_end, y_stride, num_tokens, rows_per_expert, S, HAS_BIAS
                )


@triton.jit(do_not_specialize=["num_tokens"])
def linear_kernel(
    x, qweight, scales, zeros, perm, bias, offsets, y, partial, items, num_tokens, x_stride, y_stride, rows_per_expert,
    KINDS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr,
    NATURAL: tl.constexpr, HAS_PERM: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, MATH: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """Grid: (items, blocks of tokens).

    x: [num_tokens, K], row stride x_stride. offsets: int32 [experts + 1], read where GROUPED. y: [num_tokens,
    rows_per_expert], row stride y_stride. partial: fp32 [parts, num_tokens, rows_per_expert].
    """
    item = items + tl.program_id(0) * ITEM_INTS
    lane = tl.arange(0, BLOCK_M)
    if GROUPED:
        expert = tl.load(item + EXPERT)
        begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
        for block in range(tl.program_id(1), tl.cdiv(end - begin, BLOCK_M), tl.num_programs(1)):
            one_block(
                x, qweight, scales, zeros, perm, bias, y, partial, item, begin + block * BLOCK_M + lane, end,
                num_tokens, x_stride, y_stride, rows_per_expert, KINDS, STEP, STAGES, S, BLOCK_M, NATURAL, HAS_PERM,
                HAS_BIAS, EVEN, MATH,
            )  # fmt: skip
    else:
        one_block(
            x, qweight, scales, zeros, perm, bias, y, partial, item, tl.program_id(1) * BLOCK_M + lane, num_tokens,
            num_tokens, x_stride, y_stride, rows_per_expert, KINDS, STEP, STAGES, S, BLOCK_M, NATURAL, HAS_PERM,
            HAS_BIAS, EVEN, MATH,
        )  # fmt: skip


@triton.jit
def reduce_block(
    partial, bias, y, block, tokens, tokens_end, num_tokens, y_stride, rows_per_expert, S: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Parts of one block added in their order, for some tokens."""
    row = tl.load(block + BLOCK_ROW0) + tl.arange(0, 64 * S)
    inside = row < tl.load(block + BLOCK_ROW_END)
    mask = (tokens < tokens_end)[:, None] & inside[None, :]
    column = row - tl.load(block + BLOCK_EXPERT) * rows_per_expert
    at = partial + tokens.to(tl.int64)[:, None] * rows_per_expert + column[None, :]
    sums = tl.load(at, mask=mask, other=0.0)
    stride = num_tokens.to(tl.int64) * rows_per_expert
    for part in range(1, tl.load(block + BLOCK_PARTS)):
        sums += tl.load(at + part * stride, mask=mask, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + tokens.to(tl.int64)[:, None] * y_stride + column[None, :], sums.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def reduce_kernel(
    partial, bias, offsets, y, blocks, num_tokens, y_stride, rows_per_expert, S: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """y = the parts of every block that has several, added in order, + bias. Grid: (blocks, blocks of tokens)."""
    block = blocks + tl.program_id(0) * BLOCK_INTS
    lane = tl.arange(0, BLOCK_M)
    if GROUPED:
        expert = tl.load(block + BLOCK_EXPERT)
        begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
        for some in range(tl.program_id(1), tl.cdiv(end - begin, BLOCK_M), tl.num_programs(1)):
            reduce_block(
                partial, bias, y, block, begin + some * BLOCK_M + lane, end, num_tokens, y_stride, rows_per_expert, S,
                HAS_BIAS,
            )  # fmt: skip
    else:
        reduce_block(
            partial, bias, y, block, tl.program_id(1) * BLOCK_M + lane, num_tokens, num_tokens, y_stride,
            rows_per_expert, S, HAS_BIAS,
        )  # fmt: skip
