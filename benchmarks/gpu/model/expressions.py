"""Operands of SASS as Python expressions. Names that they use, lists of numbers of 32 bits (emulator.py):

R, U: registers, uniform registers      P, V: predicates, uniform predicates      C[bank]: constants
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

MASK = 0xFFFFFFFF
SPECIAL_FLOATS = {"+INF": 0x7F800000, "INF": 0x7F800000, "-INF": 0xFF800000}


class UnknownInstruction(Exception):
    """An instruction, or a form of one, that the model does not know."""


def to_float(bits: int) -> float:
    """Value of 32 bits."""
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def to_bits(value: float) -> int:
    """fp32 nearest to a value; NaN and what is too large as the machine has them."""
    try:
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    except OverflowError:
        return 0x7F800000 if value > 0 else 0xFF800000


def signed(expression: str) -> str:
    """32 bits as a number with a sign."""
    return f"((({expression}) ^ 2147483648) - 2147483648)"


def predicate(text: str) -> str:
    """A truth value: "!UP0"."""
    word = text.lstrip("!")
    value = "True" if word.endswith("T") else f"V[{word[2:]}]" if word.startswith("UP") else f"P[{word[1:]}]"
    return f"(not {value})" if text.startswith("!") else value


def set_predicate(text: str, expression: str) -> list[str]:
    """Statements; none for PT."""
    return [] if text in ("PT", "UPT") else [f"{predicate(text)} = bool({expression})"]


def is_predicate(text: str) -> bool:
    """Whether an operand is one."""
    return re.fullmatch(r"!?U?P[\dT]", text) is not None


def address(text: str) -> str:
    """What stands in the innermost brackets: "desc[UR4][R2.64+0x8]" -> pair R2 + 8."""
    inside = re.findall(r"\[([^\[\]]*)\]", text)[-1]
    terms = []
    for sign, term in re.findall(r"([+-]*)\s*([A-Za-z0-9_.]+)", inside):
        register, _, modifier = term.partition(".")
        if term.startswith("0x"):
            value = str(int(term, 16))
        elif modifier == "64" or modifier == "64.U32":
            value = pair(register)
        elif modifier[:1] == "X":
            value = f"{word(register)} * {int(modifier[1:])}"
        else:
            value = word(register)
        terms.append(f"{'-' if '-' in sign else '+'} {value}")
    return f"({' '.join(terms)})" if terms else "0"


def constant(text: str, next_words: int = 0) -> str | None:
    """c[0x0][0x210] -> one word of the bank, that or a later one; None for another kind of operand."""
    match = re.fullmatch(r"c\[0x([0-9a-f]+)\](\[.*\])", text)
    return None if match is None else f"C[{int(match[1], 16)}][({address(match[2])} >> 2) + {next_words}]"


def word(text: str) -> str:
    """32 bits of a register, a constant or an immediate, without a sign in front."""
    if text in ("RZ", "URZ", "SRZ"):
        return "0"
    if match := re.fullmatch(r"(U?)R(\d+)", text):
        return f"{match[1] or 'R'}[{match[2]}]"
    if found := constant(text):
        return found
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return str(int(text, 16) & MASK)
    if text in SPECIAL_FLOATS or "QNAN" in text:
        return str(SPECIAL_FLOATS.get(text, 0x7FFFFFFF))
    if re.fullmatch(r"-?[\d.]+(e[-+]?\d+)?", text):
        return str(to_bits(float(text)))
    raise UnknownInstruction(f"operand {text}")


def integer(text: str) -> str:
    """32 bits with the operand's `-`, `~` or `|`."""
    if text.startswith("~"):
        return f"(~{integer(text[1:])} & {MASK})"
    if text.startswith("|"):
        return f"abs{signed(word(text.strip('|')))}"
    if text.startswith("-") and not re.match(r"-[\d]", text):
        return f"(-{word(text[1:])} & {MASK})"
    return word(re.sub(r"\.(H0_H0|H1_H1|B\d)$", "", text))


def real(text: str) -> str:
    """A float with the operand's `-` or `|`."""
    if text.startswith("-") and not re.match(r"-[\d]", text) and text not in SPECIAL_FLOATS and "QNAN" not in text:
        return f"-{real(text[1:])}"
    if text.startswith("|"):
        return f"abs({real(text.strip('|'))})"
    return f"F({word(text)})"


def pair(text: str) -> str:
    """64 bits: two registers or two words of constants."""
    if text.startswith("-") and not text.startswith("-0x"):
        return f"(-{pair(text[1:])})"
    low = word(text)
    if match := re.fullmatch(r"([RU])\[(\d+)\]", low):
        return f"({low} | {match[1]}[{int(match[2]) + 1}] << 32)"
    if high := constant(text, 1):
        return f"({low} | {high} << 32)"
    return low


def set_word(text: str, expression: str) -> list[str]:
    """Statements that write 32 bits."""
    return [] if text in ("RZ", "URZ") else [f"{word(text)} = ({expression}) & {MASK}"]


def set_words(text: str, expressions: list[str]) -> list[str]:
    """Statements that write registers next to each other. All expressions are read first."""
    if text in ("RZ", "URZ"):
        return []
    name, first = ("U", int(text[2:])) if text.startswith("U") else ("R", int(text[1:]))
    return [f"{name}[{first}:{first + len(expressions)}] = ({', '.join(expressions)},)"]


def set_pair(text: str, expression: str) -> list[str]:
    """Statements that write 64 bits."""
    return [f"w = {expression}", *set_words(text, [f"w & {MASK}", f"w >> 32 & {MASK}"])]


def set_real(text: str, expression: str) -> list[str]:
    """Statements that write a float."""
    return set_word(text, f"B({expression})")


Statements = Callable[[list[str], list[str]], list[str]]
