"""SASS instructions as Python statements, for one lane: table OPCODES, from the first word of an opcode.

Integers, predicates and addresses are exact. Floats are, where float32 operations lead to integers (divisions); matrix
products and everything of 16 bits give zero, which steers nothing in the kernels that the model runs.
"""

from __future__ import annotations

import struct

from benchmarks.gpu.model.expressions import (
    MASK,
    Statements,
    address,
    constant,
    integer,
    is_predicate,
    pair,
    predicate,
    real,
    set_pair,
    set_predicate,
    set_real,
    set_word,
    set_words,
    signed,
    word,
)

COMPARE = {"EQ": "==", "NE": "!=", "LT": "<", "LE": "<=", "GT": ">", "GE": ">="}
WORDS = {"128": 4, "64": 2}


def nothing(_words: list[str], _a: list[str]) -> list[str]:
    return []


def zeros(count: int) -> Statements:
    return lambda _words, a: set_words(a[0], ["0"] * count)


def move(_words: list[str], a: list[str]) -> list[str]:
    return set_word(a[0], integer(a[1]))


def split_predicates(a: list[str]) -> tuple[list[str], list[str]]:
    """Predicates that an operand list begins with, after the destination, and the rest."""
    count = next((i for i, text in enumerate(a) if not is_predicate(text)), len(a))
    return a[:count], a[count:]


def numbers(words: list[str], *texts: str) -> list[str]:
    """Integer operands, with a sign unless the opcode says U32."""
    return [integer(t) if "U32" in words else signed(integer(t)) for t in texts]


def imad(words: list[str], a: list[str]) -> list[str]:
    if "WIDE" in words:
        x, y = numbers(words, a[1], a[2])
        return set_pair(a[0], f"{x} * {y} + {pair(a[3])}")
    if "HI" in words:  # the addend is 64 bits
        x, y = numbers(words, a[1], a[2])
        return set_word(a[0], f"({x} * {y} + {pair(a[3])}) >> 32")
    carry = f" + {predicate(a[4])}" if "X" in words else ""
    return set_word(a[0], f"{integer(a[1])} * {integer(a[2])} + {integer(a[3])}{carry}")


def iadd3(words: list[str], a: list[str]) -> list[str]:
    carries, rest = split_predicates(a[1:])
    if "X" in words:  # a minus is a complement here
        terms = [integer(f"~{t[1:]}" if t.startswith("-") and t[1] in "RUc" else t) for t in rest[:3]]
        terms += [predicate(t) for t in rest[3:]]
    else:  # -0 has a carry: 2^32
        terms = [f"({MASK + 1} - {word(t[1:])})" if t.startswith("-") and t[1] in "RUc" else integer(t) for t in rest]
    out = [f"w = {' + '.join(terms)}"]
    for bit, text in enumerate(carries):
        out += set_predicate(text, f"w >> {32 + bit} & 1" if bit == 0 else f"w >> {32 + bit}")
    return out + set_word(a[0], "w")


def viadd(_words: list[str], a: list[str]) -> list[str]:
    return set_word(a[0], f"{integer(a[1])} + {integer(a[2])}")


def minimum_or_maximum(words: list[str], x: str, y: str, least: str, to: str) -> list[str]:
    unsigned = "U32" in words
    first, second = (f"({e}) & {MASK}" if unsigned else signed(f"({e}) & {MASK}") for e in (x, y))
    return [f"w = {first}; v = {second}", *set_word(to, f"min(w, v) if {predicate(least)} else max(w, v)")]


def imnmx(words: list[str], a: list[str]) -> list[str]:
    return minimum_or_maximum(words, integer(a[1]), integer(a[2]), a[3], a[0])


def viaddmnmx(words: list[str], a: list[str]) -> list[str]:
    return minimum_or_maximum(words, f"{integer(a[1])} + {integer(a[2])}", integer(a[3]), a[4], a[0])


def lea(words: list[str], a: list[str]) -> list[str]:
    carries, rest = split_predicates(a[1:])
    if "HI" not in words:
        shift = int(rest[2], 16)
        out = [f"w = ({integer(rest[0])} << {shift} & {MASK}) + {integer(rest[1])}"]
        for text in carries:
            out += set_predicate(text, "w >> 32")
        return out + set_word(a[0], "w")
    wide = "SX32" in words  # the upper half is the sign
    shift = int(rest[2 if wide else 3], 16) & 31
    value = signed(integer(rest[0])) if wide else f"({integer(rest[2])} << 32 | {integer(rest[0])})"
    carry = f" + {predicate(rest[-1])}" if "X" in words else ""
    return set_word(a[0], f"({value} >> {32 - shift} & {MASK}) + {integer(rest[1])}{carry}")


def lop3(_words: list[str], a: list[str]) -> list[str]:
    found, rest = split_predicates(a)
    table = int(rest[4], 16)
    names = ("~x", "x"), ("~y", "y"), ("~z", "z")
    terms = (
        " & ".join(n[i >> s & 1] for n, s in zip(names, (2, 1, 0), strict=True)) for i in range(8) if table >> i & 1
    )
    x, y, z = (integer(t) for t in rest[1:4])
    return [
        f"x = {x}; y = {y}; z = {z}; w = ({' | '.join(terms) or '0'}) & {MASK}",
        *(statement for text in found for statement in set_predicate(text, "w")),
        *set_word(rest[0], "w"),
    ]


def plop3(_words: list[str], a: list[str]) -> list[str]:
    x, y, z = (predicate(t) for t in a[2:5])
    first, second = int(a[5], 16), int(a[6], 16)
    out = [f"w = {x} << 2 | {y} << 1 | {z}"]
    return out + set_predicate(a[0], f"{first} >> w & 1") + set_predicate(a[1], f"{second} >> w & 1")


def shf(words: list[str], a: list[str]) -> list[str]:
    low, shift, high = (integer(t) for t in a[1:4])
    most = 63 if "U64" in words else 31 if "S32" in words else 32
    out = [f"w = min({shift}, {most})"]
    both = f"({high} << 32 | {low})"
    if words[1] == "L":
        return out + set_word(a[0], f"{both} << w >> 32" if "HI" in words else f"{low} << w")
    if "HI" not in words:
        return out + set_word(a[0], f"{both} >> w")
    return out + set_word(a[0], f"{signed(high) if 'S32' in words else high} >> w")


def combined(words: list[str], found: str, condition: str, to: list[str]) -> list[str]:
    """A comparison joined with another predicate, and its opposite."""
    joint = {"AND": "and", "OR": "or", "XOR": "!="}[next(w for w in words if w in ("AND", "OR", "XOR"))]
    out = [f"w = bool({found}); v = {condition}"]
    return out + set_predicate(to[0], f"w {joint} v") + set_predicate(to[1], f"(not w) {joint} v")


def isetp(words: list[str], a: list[str]) -> list[str]:
    x, y = numbers(words, a[2], a[3])
    found = f"{x} {COMPARE[words[1]]} {y}"
    if "EX" in words:  # upper halves; the lower ones gave the last predicate
        strict = {"EQ": "and", "NE": "or"}.get(words[1])
        lower = predicate(a[5])
        found = f"{found} {strict} {lower}" if strict else f"{x} {words_strict(words[1])} {y} or {x} == {y} and {lower}"
    return combined(words, found, predicate(a[4]), a)


def words_strict(compare: str) -> str:
    return "<" if compare[0] == "L" else ">"


def fsetp(words: list[str], a: list[str]) -> list[str]:
    x, y = real(a[2]), real(a[3])
    return combined(words, f"{x} {COMPARE[words[1].removesuffix('U') if len(words[1]) == 3 else words[1]]} {y}",
                    predicate(a[4]), a)  # fmt: skip


def select(_words: list[str], a: list[str]) -> list[str]:
    return set_word(a[0], f"{integer(a[1])} if {predicate(a[3])} else {integer(a[2])}")


def permute(_words: list[str], a: list[str]) -> list[str]:
    return set_word(a[0], f"permute({integer(a[1])}, {integer(a[2])}, {integer(a[3])})")


def predicates_to_register(_words: list[str], a: list[str]) -> list[str]:
    return set_word(a[0], f"sum(P[i] << i for i in range(7)) & {integer(a[-1])}")


def register_to_predicates(_words: list[str], a: list[str]) -> list[str]:
    return [
        f"w = {integer(a[1])}",
        f"P[:7] = [bool(w >> i & 1) if {integer(a[2])} >> i & 1 else P[i] for i in range(7)]",
    ]


def to_real(words: list[str], a: list[str]) -> list[str]:
    value = integer(a[1]) if {"U32", "RP", "U16", "U8"} & set(words) else signed(integer(a[1]))
    return set_word(a[0], f"{'round_up' if 'RP' in words else 'B'}({value})")


def to_integer(words: list[str], a: list[str]) -> list[str]:
    return set_word(a[0], f"truncate({real(a[1])}, {'U32' in words})")


def mufu(words: list[str], a: list[str]) -> list[str]:
    if words[1] == "RCP":
        return set_real(a[0], f"reciprocal({real(a[1])})")
    if words[1] == "EX2":
        return set_real(a[0], f"2.0 ** max(-150.0, min(127.0, {real(a[1])}))")
    return set_word(a[0], "0")


def float_of(pattern: str) -> Statements:
    return lambda _words, a: set_real(a[0], pattern.format(*(real(t) for t in a[1:])))


def special_register(words: list[str], a: list[str]) -> list[str]:
    if words[0] == "CS2R" and "32" not in words:
        return set_words(a[0], ["0", "0"])
    return set_word(a[0], f"Z.get({a[1]!r}, 0)")


def load_constant(words: list[str], a: list[str]) -> list[str]:
    found = constant(a[1])
    assert found
    if "64" in words:
        return set_words(a[0], [found, str(constant(a[1], 1))])
    if "U16" in words or "U8" in words:
        at = address(a[1])
        return set_word(a[0], f"{found} >> 8 * ({at} & 3) & {0xFFFF if 'U16' in words else 0xFF}")
    return set_word(a[0], found)


def count_of(words: list[str]) -> int:
    """Registers of a memory access."""
    return next((WORDS[w] for w in words if w in WORDS), 1)


def load_shared(words: list[str], a: list[str]) -> list[str]:
    return [f"w = {address(a[1])}", *set_words(a[0], [f"M.get(w + {4 * i}, 0)" for i in range(count_of(words))])]


def registers(words: list[str], first: str) -> list[str]:
    """What a store writes."""
    return ["0" if first == "RZ" else f"R[{int(first[1:]) + i}]" for i in range(count_of(words))]


def store_shared(words: list[str], a: list[str]) -> list[str]:
    return [f"w = {address(a[0])}", *(f"M[w + {4 * i}] = {v}" for i, v in enumerate(registers(words, a[1])))]


def load_global(words: list[str], a: list[str]) -> list[str]:
    return [f"m = {address(a[1])}", *set_words(a[0], [f"load(m + {4 * i})" for i in range(count_of(words))])]


def store_global(words: list[str], a: list[str]) -> list[str]:
    return [f"m = {address(a[0])}", *(f"store(m + {4 * i}, {v})" for i, v in enumerate(registers(words, a[1])))]


def copy_to_shared(_words: list[str], a: list[str]) -> list[str]:
    return [f"m = {address(a[1])}"]


def atomic(_words: list[str], a: list[str]) -> list[str]:
    return [f"m = {address(a[2])}", f"w = atomic(m, {word(a[3])})", *set_word(a[1], "w")]


def reduction(_words: list[str], a: list[str]) -> list[str]:
    return [f"m = {address(a[0])}", f"atomic(m, {word(a[1])})"]


def half_pair(_words: list[str], a: list[str]) -> list[str]:
    """HFMA2; of zeros and two immediates it is how the compiler loads a word, else a product that steers nothing."""
    known = len(a) == 5 and a[1].lstrip("-") == a[2] == "RZ"
    return set_word(a[0], str(half_bits(a[3]) << 16 | half_bits(a[4])) if known else "0")


def half_bits(text: str) -> int:
    """fp16 of an immediate."""
    return int(struct.unpack("<H", struct.pack("<e", float(text)))[0])


def shuffle(_words: list[str], a: list[str]) -> list[str]:
    return set_predicate(a[0], "True") + set_word(a[1], integer(a[2]))


def vote(_words: list[str], a: list[str]) -> list[str]:
    if is_predicate(a[0]):
        return set_predicate(a[0], predicate(a[1]))
    return set_word(a[0], f"{MASK} * {predicate(a[-1])}")


OPCODES: dict[str, Statements] = {
    "MOV": move, "UMOV": move, "R2UR": move, "IABS": lambda w, a: set_word(a[0], f"abs{signed(integer(a[1]))}"),
    "IMAD": imad, "UIMAD": imad, "IADD3": iadd3, "UIADD3": iadd3, "VIADD": viadd, "IMNMX": imnmx, "VIMNMX": imnmx,
    "VIADDMNMX": viaddmnmx, "LEA": lea, "ULEA": lea, "LOP3": lop3, "ULOP3": lop3, "PLOP3": plop3,
    "UPLOP3": plop3, "SHF": shf,
    "USHF": shf, "ISETP": isetp, "UISETP": isetp, "FSETP": fsetp, "SEL": select, "USEL": select, "FSEL": select,
    "PRMT": permute, "UPRMT": permute, "P2R": predicates_to_register, "R2P": register_to_predicates,
    "I2FP": to_real, "I2F": to_real, "F2I": to_integer, "MUFU": mufu,
    "FMUL": float_of("{0} * {1}"), "FADD": float_of("{0} + {1}"), "FFMA": float_of("{0} * {1} + {2}"),
    "S2R": special_register, "S2UR": special_register, "CS2R": special_register,
    "LDC": load_constant, "ULDC": load_constant, "LDS": load_shared, "STS": store_shared, "LDSM": zeros(4),
    "LDG": load_global, "STG": store_global, "LDGSTS": copy_to_shared, "ATOMG": atomic, "REDG": reduction,
    "SHFL": shuffle, "VOTE": vote, "VOTEU": vote, "HMMA": zeros(4), "HADD2": zeros(1), "HMUL2": zeros(1),
    "HFMA2": half_pair, "F2FP": zeros(1), "F2F": zeros(1), "FCHK": lambda w, a: set_predicate(a[0], "False"),
    **dict.fromkeys(
        ("NOP", "WARPSYNC", "BSSY", "BSYNC", "BREAK", "ENDCOLLECTIVE", "YIELD", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL",
         "PREEXIT", "ACQBULK", "DEPBAR", "LDGDEPBAR", "BAR"), nothing
    ),
}  # fmt: skip
MEMORY = ("LDG", "STG", "LDGSTS", "ATOMG", "REDG")  # their address is part of the trace
