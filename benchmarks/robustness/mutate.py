"""Mutations of bytes, of JSON and of text, each decided by a random.Random alone.

A JSON value is mutated as a tree whose objects are lists of pairs (so that a key can stand twice), and then, now and
then, the bytes of its text are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any


class Pairs(list[tuple[str, Any]]):
    """An object of JSON: (key, value) in order, repeats allowed."""


class Raw(str):
    """Text that stands in the JSON as it is."""


NUMBERS = ("0", "1", "-1", "2", "3", "7", "8", "9", "16", "63", "64", "65", "127", "128", "255", "256", "1000", "4096",
           "65536", "16777216", "2147483647", "2147483648", "-2147483648", "4294967296", "9007199254740993",
           "9223372036854775807", "9223372036854775808", "-9223372036854775808", "18446744073709551616", "1" + "0" * 30,
           "9" * 5000, "0.5", "-0.0", "1e-320", "1e308", "1e400", "-1e400", "64.0", "NaN", "Infinity",
           "-Infinity")  # fmt: skip
TEXTS = ("", " ", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "nul\0", "new\nline", "ü", "😀", "\ud800", "\u202e",
         "a.b.c", ".a", "a.", "a..b", "re:", "re:.*", "lm_head", "model", "float16", "int", "none", "null", "true",
         "I32", "F16", "BF16", "F8_E4M3", "U8", "model.safetensors", "config.json", "x" * 600, "y" * 20_000,
         "__metadata__", "__class__", "__init__")  # fmt: skip
LARGE = 2**22  # bytes that are not made more of
WORDS = ("null", "true", "false", "[]", "{}", "[[]]", "[null]", '[""]', '{"": null}')


def tree(value: Any) -> Any:
    """A parsed JSON value as it is mutated."""
    if isinstance(value, dict):
        return Pairs((key, tree(item)) for key, item in value.items())
    return [tree(item) for item in value] if isinstance(value, list) else value


def text(value: Any) -> str:
    """JSON text of a tree."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {text(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(text, value)) + "]"
    return json.dumps(value)


def nested(chance: Random) -> Raw:
    """A value nested a few or very many deep."""
    depth = chance.choice((2, 5, 50, 500, 3000, 100_000))
    opened, closed = chance.choice((("[", "]"), ('{"a":', "}"), ('[{"a":[', "]}]")))
    return Raw(opened * depth + "0" + closed * depth)


def anything(chance: Random) -> Any:
    """A value that nobody expects."""
    how = chance.randrange(20)
    if how < 9:
        return Raw(chance.choice(NUMBERS))
    if how < 15:
        return chance.choice(TEXTS)
    if how < 19:
        return Raw(chance.choice(WORDS))
    return nested(chance)


def _places(value: Any) -> list[tuple[Any, int]]:
    """(object or list, index) of every value in a tree."""
    out, pending = [], [value]
    while pending:
        held = pending.pop()
        if isinstance(held, list):
            out += [(held, index) for index in range(len(held))]
            pending += [item[1] for item in held] if isinstance(held, Pairs) else held
    return out


def _get(held: Any, index: int) -> Any:
    return held[index][1] if isinstance(held, Pairs) else held[index]


def _put(held: Any, index: int, value: Any) -> None:
    held[index] = (held[index][0], value) if isinstance(held, Pairs) else value


def _nearby(chance: Random, value: Any) -> Any:
    """Another value of the same type, not far from this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice((value + 1, value - 1, -value, value * 2, value * 64, value // 2, value + 64, str(value)))
    if isinstance(value, float):
        return chance.choice((value * 2, -value, value * 1e30, int(value)))
    if isinstance(value, str) and not isinstance(value, Raw):
        at = chance.randrange(len(value) + 1)
        return chance.choice(
            (
                value[:at] + chance.choice(TEXTS[:20]) + value[at:],
                value[:at] + value[at + 1 :],
                value.upper(),
                value * 2,
            )
        )
    return anything(chance)


def mutate_tree(chance: Random, value: Any, known: tuple[str, ...] = ()) -> Any:
    """One change of a tree, in place. known: keys and texts that mean something to whoever reads it."""
    places = _places(value)
    if not places or chance.random() < 0.01:
        return anything(chance)
    held, index = chance.choice(places)
    how = chance.randrange(14)
    if how == 0:
        del held[index]
    elif how == 1:
        held.insert(chance.randrange(len(held) + 1), held[index])
    elif how == 2 and isinstance(held, Pairs):
        key = chance.choice((*known, *TEXTS, held[index][0] + "x", held[index][0][:-1], chance.choice(held)[0]))
        held[index] = (key, held[index][1])
    elif how == 3:
        other, place = chance.choice(places)
        if place < len(other) and index < len(held):
            one, two = _get(held, index), _get(other, place)
            if one is not other and two is not held:
                _put(held, index, json.loads(json.dumps(two)) if isinstance(two, list) else two)
    elif how == 4:
        small = not isinstance(_get(held, index), list) and len(str(held[index])) < 1000
        held[index:index] = [held[index]] * (chance.choice((2, 10, 300)) if small else 2)
    elif how == 5:
        chance.shuffle(held)
    elif how == 6:
        _put(held, index, [_get(held, index)])
    elif how == 7 and known:
        _put(held, index, chance.choice(known))
    elif how < 11:
        _put(held, index, _nearby(chance, _get(held, index)))
    else:
        _put(held, index, anything(chance))
    return value


def mutate_json(chance: Random, value: Any, known: tuple[str, ...] = ()) -> bytes:
    """The text of a parsed value after one to four changes, its bytes changed too in one case of five."""
    changed = tree(value)
    for _ in range(chance.choice((1, 1, 1, 1, 1, 2, 4))):
        changed = mutate_tree(chance, changed, known)
    data = text(changed).encode("utf-8", "surrogatepass")
    return mutate_bytes(chance, data) if chance.random() < 0.2 else data


def _cut(chance: Random, data: bytes) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _flip(chance: Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if out:
            out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out)


def _insert(chance: Random, data: bytes) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.randbytes(chance.choice((1, 2, 7, 64))) + data[at:]


def _remove(chance: Random, data: bytes) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + data[at + chance.choice((1, 2, 7, 64)) :]


def _repeat(chance: Random, data: bytes) -> bytes:
    at = chance.randrange(len(data) + 1)
    piece = data[at : at + chance.choice((1, 7, 64, 1000))]
    return data[:at] + piece * chance.choice((2, 3, 100)) + data[at:]


def _recode(chance: Random, data: bytes) -> bytes:
    mark = chance.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\x80", b"\0", b"\xf4\x90\x80\x80"))
    if chance.random() < 0.3:
        return data.decode("utf-8", "replace").encode(chance.choice(("utf-16", "utf-32", "latin-1")), "replace")
    at = chance.choice((0, len(data), chance.randrange(len(data) + 1)))
    return data[:at] + mark + data[at:]


BYTES: tuple[Callable[[Random, bytes], bytes], ...] = (_cut, _flip, _flip, _insert, _remove, _repeat, _recode)


def mutate_bytes(chance: Random, data: bytes) -> bytes:
    """Bytes cut off, flipped, put in, taken out, repeated, or in another encoding."""
    for _ in range(chance.choice((1, 1, 2)) if len(data) < LARGE else 0):
        data = chance.choice(BYTES)(chance, data)
    return data
