"""Words of a supertile -> operand A of the tensor cores: exact (code - zero), times a power of two.

A field of a word, masked in place, is the bit pattern of a 16-bit float whose exponent is zero: fp16 reads it as
code * 2^(shift - 24), bf16 as code * 2^(shift - 133). One multiply-add for each pair brings all of them to the same
power of two, `unit`, and subtracts the zero point:

    fp16: fma(field, 2^(15 - shift), -zero * 2^-9)    = (code - zero) * 2^-9
    bf16: fma(field, 2^(127 - shift), -zero * 2^-6)   = (code - zero) * 2^-6

Both are exact: code - zero is a whole number of halves, of at most 8 bits. The
multiply-add takes subnormal operands (PTX ISA, fma.f16x2 and fma.bf16x2; AMD's default mode); whether tensor cores do
is of no consequence, because none reaches them.

Words come as [S, 128]: one supertile for each warp, 16 bytes for each lane, which is where the fragment of
`mma.m16n8k16` and `wgmma` wants them. Rows of a tile of S supertiles are in the order (t, supertile, h, g), so that
every warp keeps its own supertile and no word passes through shared memory. The order of columns depends on the
compiler: it gives a lane two neighbouring columns (`NATURAL`: as they are in W) or four (configs.natural_columns).
"""

import triton
import triton.language as tl

from ...format import codes
from ...format.codes import FORMATS
from ...format.kinds import FIXED_KINDS, KINDS, ZERO_KINDS

bit_index = triton.constexpr_function(codes.bit_index)

# How fields become numbers. PTX: by one instruction for a pair, named outright, because LLVM finds it only where zero
# points are constants. WIDE is for the interpreter, which stores bf16 as integers and cannot compute with it: the same
# constants, in fp32.
FP16, BF16, WIDE, PTX_FP16, PTX_BF16 = range(5)


@triton.constexpr_function
def planes_of(bits, width):
    """How many planes of `width` a format has."""
    return FORMATS[bits].planes.count(width)


@triton.constexpr_function
def in_operand(kind):
    """Whether operand A of a storage kind is code - zero; else it is the code."""
    name = ZERO_KINDS[kind]
    return name in FIXED_KINDS or KINDS[name].stored == "uint8"


@triton.constexpr_function
def fixed_zero(kind, bits):
    """Zero point of a storage kind that stores none."""
    return KINDS[ZERO_KINDS[kind]].zero(bits, 0.0)


@triton.constexpr_function
def field_shift(bits, t, h):
    """Place of the field of rows 16 t + 8 h .. in its byte, after `merged`."""
    if bits in (1, 2, 4):
        return bit_index(bits, 16 * t + 8 * h, 0)
    if bits == 3:
        return 4 * (t & 1) + h
    return (8 - bits) * h


@triton.constexpr_function
def pair_mask(bits, shift):
    """Mask of a field in both halves of a word."""
    return FORMATS[bits].max_code * 0x00010001 << shift


@triton.constexpr_function
def one_bit(t):
    """Place of the 1-bit field of row half 0."""
    return bit_index(1, 16 * t, 0)


@triton.constexpr_function
def is_fp16(math):
    """Whether operand A is fp16."""
    return math in (FP16, PTX_FP16)


@triton.constexpr_function
def is_ptx(math):
    """Whether pairs are computed by a PTX instruction."""
    return math in (PTX_FP16, PTX_BF16)


@triton.constexpr_function
def is_wide(math):
    """Whether bf16 is computed in fp32."""
    return math == WIDE


@triton.constexpr_function
def math_dtype(math):
    """What operand A is computed in."""
    return (tl.float16, tl.bfloat16, tl.float32, tl.float16, tl.bfloat16)[math]


@triton.constexpr_function
def lift(math, shift):
    """Factor that brings a field to `unit`."""
    return 2.0 ** ((15 if math in (FP16, PTX_FP16) else 127) - shift)


@triton.constexpr_function
def lift_word(math, shift):
    """`lift` in both halves of a word: a power of two is its exponent."""
    half = (15 - shift + 15) << 10 if math == PTX_FP16 else (127 - shift + 127) << 7
    return half * 0x00010001


@triton.constexpr_function
def pair_instruction(math):
    """Multiply-add of pairs."""
    return f"fma.rn.{'f16x2' if math == PTX_FP16 else 'bf16x2'} $0, $1, $2, $3;"


@triton.constexpr_function
def unit(math):
    """Power of two that operand A carries."""
    return 2.0 ** (-9 if math in (FP16, PTX_FP16) else -6)


@triton.constexpr_function
def inverse_unit(math):
    """What brings sums of products with operand A back."""
    return 2.0 ** (9 if math in (FP16, PTX_FP16) else 6)


@triton.constexpr_function
def place(bits, width, index, chunks):
    """Where `load_words` puts word tensor `index` of a plane: width 4 by chunk (and plane), 2 by pair of chunks, 1."""
    fours = FORMATS[bits].planes.count(4) * chunks
    twos = FORMATS[bits].planes.count(2) * max(chunks // 2, 1)
    return {4: 0, 2: fours, 1: fours + twos}[width] + index


@triton.jit
def select(mask: tl.constexpr, a, b):
    """Bits of `a` where the mask is set, of `b` elsewhere: one instruction."""
    return (a & mask) | (b & (0xFFFFFFFF ^ mask))


@triton.jit
def moved(word, up: tl.constexpr):
    """Bits moved up, or down where `up` is negative."""
    if up >= 0:
        out = word << up
    else:
        out = word >> (0 - up)
    return out


@triton.jit
def split4(v, S: tl.constexpr):
    """[S, 128] -> four [S, 8, 4]: the words of one lane apart."""
    even, odd = tl.split(tl.reshape(v, (S, 8, 4, 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def fours_of(words, PLANE: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr, S: tl.constexpr):
    """Words of the four m16 tiles in a plane of width 4."""
    return split4(words[place(BITS, 4, PLANE * CHUNKS + C, CHUNKS)], S)


@triton.jit
def twos_of(words, C: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr, S: tl.constexpr):
    """Words of m16 tiles 0 and 1, and of 2 and 3, in the plane of width 2."""
    v = words[place(BITS, 2, C // 2, CHUNKS)]
    if CHUNKS == 1:
        u0, u1 = tl.split(tl.reshape(v, (S, 8, 4, 2)))
    else:
        v0, v1, v2, v3 = split4(v, S)
        if C % 2 == 0:
            u0, u1 = v0, v1
        else:
            u0, u1 = v2, v3
    return u0, u1


@triton.jit
def ones_of(words, C: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr, S: tl.constexpr):
    """Word of all m16 tiles in the plane of width 1."""
    v = words[place(BITS, 1, 0, CHUNKS)]
    if CHUNKS == 1:
        out = tl.reshape(v, (S, 8, 4))
    elif CHUNKS == 2:
        out = tl.split(tl.reshape(v, (S, 8, 4, 2)))[C]
    else:
        out = split4(v, S)[C]
    return out


@triton.jit
def merged(words, C: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr, S: tl.constexpr):
    """Two [S, 8, 4]: words whose bytes hold the fields of m16 tile T, of row half 0 and of row half 1.

    Whole words at a time. What stands beside the fields is masked by `field`.
    """
    if planes_of(BITS, 4) > 0:
        high = fours_of(words, 0, C, BITS, CHUNKS, S)[T]
    if planes_of(BITS, 2) > 0:
        two = twos_of(words, C, BITS, CHUNKS, S)[T // 2]
    if planes_of(BITS, 1) > 0:
        one = ones_of(words, C, BITS, CHUNKS, S)
    if BITS == 1:
        rows0, rows8 = one, one
    elif BITS == 2:
        rows0, rows8 = two, two
    elif BITS == 3:
        # A 2-bit field at bits 2..3 of a nibble is joined by its 1-bit field on either side: bits 0..2 and 1..3.
        ones = moved(one, -(T // 2 * 2))
        rows0, rows8 = select(0x66666666, two << 1, ones), select(0xCCCCCCCC, two, ones)
    elif BITS == 4:
        rows0, rows8 = high, high
    elif BITS == 5:
        rows0 = select(0x1E1E1E1E, high << 1, moved(one, -one_bit(T)))
        rows8 = select(0xF0F0F0F0, high, moved(one, 2 - one_bit(T)))
    elif BITS == 6:
        twos = moved(two, -(T % 2 * 4))
        rows0, rows8 = select(0x3C3C3C3C, high << 2, twos), select(0xF0F0F0F0, high, twos)
    elif BITS == 7:
        ones = moved(one, -one_bit(T))
        low0 = select(0x06060606, moved(two, 1 - T % 2 * 4), ones)
        low8 = select(0x0C0C0C0C, moved(two, -(T % 2 * 4)), ones)
        rows0, rows8 = select(0x78787878, high << 3, low0), select(0xF0F0F0F0, high, low8)
    else:
        low = fours_of(words, 1, C, BITS, CHUNKS, S)[T]
        rows0, rows8 = select(0xF0F0F0F0, high << 4, low), select(0xF0F0F0F0, high, low >> 4)
    return rows0, rows8


@triton.jit
def pair_of(word, MATH: tl.constexpr):
    """The two halves of words [S, 8, 4] as numbers, [S, 8, 4, 2]."""
    halves = tl.join(word.to(tl.uint16), (word >> 16).to(tl.uint16))
    if is_wide(MATH):
        pair = (halves.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        pair = halves.to(math_dtype(MATH), bitcast=True)
    return pair


@triton.jit
def word_of(value, MATH: tl.constexpr):
    """A word with fp32 `value` in both halves; exact for values of 8 significant bits."""
    if is_fp16(MATH):
        half = value.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        half = value.to(tl.uint32, bitcast=True) >> 16
    return half | (half << 16)


@triton.jit
def field(word, zero, BITS: tl.constexpr, SHIFT: tl.constexpr, MATH: tl.constexpr):
    """Pairs of columns [S, 8, 4, 2] from words [S, 8, 4]. zero: words of -zero * unit."""
    masked = word & pair_mask(BITS, SHIFT)
    if is_ptx(MATH):
        factor = tl.full(word.shape, lift_word(MATH, SHIFT), tl.uint32)
        lifted = tl.inline_asm_elementwise(
            pair_instruction(MATH), "=r,r,r,r", [masked, factor, zero], dtype=tl.uint32, is_pure=True, pack=1
        )
        out = pair_of(lifted, MATH)
    else:
        pair = pair_of(masked, MATH)
        out = tl.fma(pair, tl.full(pair.shape, lift(MATH, SHIFT), pair.dtype), pair_of(zero, MATH))
    return out


@triton.jit
def tile_rows(
    words, zeros, C: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr, S: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """[S, g, q, e, h, m] of m16 tile T in k16 chunk C."""
    rows0, rows8 = merged(words, C, T, BITS, CHUNKS, S)
    z0, z8 = zeros[T], zeros[4 + T]
    SHIFT0: tl.constexpr = field_shift(BITS, T, 0)
    SHIFT8: tl.constexpr = field_shift(BITS, T, 1)
    m0 = tl.join(field(rows0, z0, BITS, SHIFT0, MATH), field(rows8, z8, BITS, SHIFT8, MATH))
    m1 = tl.join(field(rows0 >> 8, z0, BITS, SHIFT0, MATH), field(rows8 >> 8, z8, BITS, SHIFT8, MATH))
    return tl.join(m0, m1)


@triton.jit
def chunk(words, zeros, C: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr, S: tl.constexpr, MATH: tl.constexpr):
    """[S, g, q, e, h, m, t & 1, t >> 1] of k16 chunk C."""
    t0 = tile_rows(words, zeros, C, 0, BITS, CHUNKS, S, MATH)
    t1 = tile_rows(words, zeros, C, 1, BITS, CHUNKS, S, MATH)
    t2 = tile_rows(words, zeros, C, 2, BITS, CHUNKS, S, MATH)
    t3 = tile_rows(words, zeros, C, 3, BITS, CHUNKS, S, MATH)
    return tl.join(tl.join(t0, t1), tl.join(t2, t3))


@triton.jit
def operand(
    words, zeros, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr, S: tl.constexpr,
    MATH: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Operand A [64 S, 16 COUNT], (code - zero) * unit: COUNT k16 chunks from FIRST on of a step of CHUNKS.

    words: `load_words`. zeros: words of -zero * unit, eight [S, 8, 4]: four m16 tiles for each row half.
    """
    f = chunk(words, zeros, FIRST, BITS, CHUNKS, S, MATH)
    if COUNT == 1:
        if NATURAL:
            f = tl.permute(f, (7, 6, 0, 4, 1, 5, 2, 3))
        else:
            f = tl.permute(f, (7, 6, 0, 4, 1, 2, 5, 3))
    elif COUNT == 2:
        f = tl.join(f, chunk(words, zeros, FIRST + 1, BITS, CHUNKS, S, MATH))
        if NATURAL:
            f = tl.permute(f, (7, 6, 0, 4, 1, 8, 5, 2, 3))
        else:
            f = tl.permute(f, (7, 6, 0, 4, 1, 8, 2, 5, 3))
    else:
        f01 = tl.join(f, chunk(words, zeros, FIRST + 1, BITS, CHUNKS, S, MATH))
        c2 = chunk(words, zeros, FIRST + 2, BITS, CHUNKS, S, MATH)
        f = tl.join(f01, tl.join(c2, chunk(words, zeros, FIRST + 3, BITS, CHUNKS, S, MATH)))
        if NATURAL:
            f = tl.permute(f, (7, 6, 0, 4, 1, 9, 8, 5, 2, 3))
        else:
            f = tl.permute(f, (7, 6, 0, 4, 1, 9, 8, 2, 5, 3))
    return tl.reshape(f, (64 * S, 16 * COUNT))


@triton.jit
def column_of(CHUNKS: tl.constexpr, NATURAL: tl.constexpr):
    """Column in W of each column of `operand`, [16 CHUNKS]."""
    k = tl.arange(0, 16 * CHUNKS)
    if not NATURAL:
        k = k // 16 * 16 + k % 4 // 2 * 8 + k % 16 // 4 * 2 + k % 2
    return k


@triton.jit
def row_of(S: tl.constexpr):
    """Row in W of each row of `operand`, [64 S]."""
    r = tl.arange(0, 64 * S)
    return r // 16 % S * 64 + r // (16 * S) * 16 + r % 16


@triton.jit
def row_place(S: tl.constexpr):
    """Place of each row of `operand` among the scales of its S supertiles, [64 S]: codes.row_position."""
    r = tl.arange(0, 64 * S)
    return r // 16 % S * 64 + r % 8 * 8 + r // 8 % 2 * 4 + r // (16 * S)


@triton.jit
def load_words(bases, tile, chunk0, mask, BITS: tl.constexpr, CHUNKS: tl.constexpr, S: tl.constexpr):
    """Words of one step: `place` says in which order.

    bases: pointers [S, 1] to the first word of a supertile, for each plane. tile: supertiles from there. chunk0: first
    k16 chunk in it. mask: [S, 1].
    """
    out = ()
    PLANES: tl.constexpr = plane_widths(BITS)
    for p in tl.static_range(len(PLANES)):
        base = bases[p] + tile * (128 * PLANES[p])
        if PLANES[p] == 4:
            for c in tl.static_range(CHUNKS):
                at = base + (chunk0 + c) * 128 + tl.arange(0, 128)[None, :]
                out = out + (load_once(at, mask),)
        elif PLANES[p] == 2:
            if CHUNKS == 1:
                j = tl.arange(0, 64)[None, :]
                out = out + (load_once(base + chunk0 // 2 * 128 + chunk0 % 2 * 2 + j // 2 * 4 + j % 2, mask),)
            else:
                for i in tl.static_range(CHUNKS // 2):
                    at = base + (chunk0 // 2 + i) * 128 + tl.arange(0, 128)[None, :]
                    out = out + (load_once(at, mask),)
        else:
            j = tl.arange(0, 32 * CHUNKS)[None, :]
            out = out + (load_once(base + chunk0 + j // CHUNKS * 4 + j % CHUNKS, mask),)
    return out


@triton.constexpr_function
def plane_widths(bits):
    """Widths of the planes, in their order."""
    return FORMATS[bits].planes


@triton.jit
def load_once(at, mask):
    """Words that nobody reads again."""
    words = tl.load(at, mask=tl.broadcast_to(mask, at.shape), other=0, eviction_policy="evict_first")
    return words.to(tl.uint32, bitcast=True)
