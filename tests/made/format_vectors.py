"""The golden vectors, docs/format_vectors.json, written from docs/format.md alone: nothing of the package is used here.

    python -m tests.made.format_vectors > docs/format_vectors.json

tests/format/test_vectors.py compares the file with what this prints, and what the package packs with the file. Plain
Python floats hold every product and sum of two fp32 numbers well enough that one more rounding gives that of fp32.
"""

from __future__ import annotations

import hashlib
import json
import struct

COMMENT = (
    "Golden vectors of docs/format.md, version 2, written by tests/made/format_vectors.py. A stream of numbers: "
    "s = (1664525 s + 1013904223) mod 2**32 from s = seed, each s in turn. Segments in order; of each, first its codes "
    "s >> (32 - bits), row by row; then, row by row and group by group, its scales (-1)^b31 * (1 + m / 2^p) * "
    "2^(b30b29 - 2), m the p bits of s below b29, p = 23, 10, 7 for float32, float16, bfloat16; then in the same order "
    "its zeros: `int` s >> 24, `float` and `min` as the scales are. perm: column j of the codes is column (7 j + 3) "
    "mod K of W. dense: W as float32, in rows. First values are those of the tensor as stored; of float16 and bfloat16 "
    "their bits."
)
DTYPES = ("float32", "float16", "bfloat16")
KINDS = ("none", "half", "int", "float", "min")
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (4, 4)}
PRECISION = {"float32": 23, "float16": 10, "bfloat16": 7}


class Stream:
    """The numbers of a seed."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def next(self) -> int:
        """32 bits."""
        self.state = (self.state * 1664525 + 1013904223) % 2**32
        return self.state

    def real(self, dtype: str) -> float:
        """A number that the dtype holds."""
        bits, p = self.next(), PRECISION[dtype]
        size = (1 + (bits >> (29 - p)) % 2**p / 2**p) * 2.0 ** ((bits >> 29 & 3) - 2)
        return -size if bits >> 31 else size


def fp32(value: float) -> float:
    """The nearest fp32 number."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def stored(value: float, dtype: str) -> bytes:
    """Bytes of a number that the dtype holds."""
    if dtype == "uint8":
        return struct.pack("<B", int(value))
    if dtype == "float16":
        return struct.pack("<e", value)
    return struct.pack("<f", value) if dtype == "float32" else struct.pack("<f", value)[2:]


def weight(code: int, scale: float, zero: float, kind: str) -> float:
    """Section 1: two roundings in fp32, and no -0."""
    if kind == "min":
        return fp32(fp32(code * scale) + zero) + 0.0
    return fp32(fp32(code - zero) * scale) + 0.0


def fixed_zero(bits: int, kind: str) -> float:
    """The zero point of a kind that stores none."""
    return (2**bits - 1) / 2 if kind == "half" or bits == 1 else 2.0 ** (bits - 1)


def tiles(extent: int) -> int:
    """Supertiles that hold so many rows or columns."""
    return (extent + 63) // 64


def pack_codes(codes: list[list[int]], bits: int) -> list[int]:
    """Section 3: the words of a segment."""
    rows, cols = tiles(len(codes)), tiles(len(codes[0]))
    out: list[int] = []
    left = bits
    for width in PLANES[bits]:
        left -= width
        plane = [0] * (rows * cols * 128 * width)
        for n, row in enumerate(codes):
            t, h, g = n % 64 // 16, n % 16 // 8, n % 8
            for k, code in enumerate(row):
                field = code >> left & (1 << width) - 1
                if not field:
                    continue
                c, m, q, e = k % 64 // 16, k % 16 // 8, k % 8 // 2, k % 2
                lane = 4 * g + q
                if width == 4:
                    word, bit = (c * 32 + lane) * 4 + t, 16 * e + 8 * m + 4 * h
                elif width == 2:
                    word = (c // 2 * 32 + lane) * 4 + c % 2 * 2 + t // 2
                    bit = 16 * e + 8 * m + 4 * (t % 2) + 2 * h
                else:
                    word, bit = lane * 4 + c, 16 * e + 8 * m + 4 * (t % 2) + 2 * (t // 2) + h
                plane[(n // 64 * cols + k // 64) * 128 * width + word] |= field << bit
        out += plane
    return out


def pack_rows(values: list[list[float]]) -> list[float]:
    """Section 4: values [rows][groups] of a segment in the order of the file."""
    groups = len(values[0])
    out = [0.0] * (tiles(len(values)) * groups * 64)
    for n, row in enumerate(values):
        for group, value in enumerate(row):
            out[(n // 64 * groups + group) * 64 + 8 * (n % 8) + 4 * (n % 16 // 8) + n % 64 // 16] = value
    return out


def summary(data: bytes, width: int) -> dict[str, object]:
    """Number of elements of `width` bytes, the bits of the first eight, and the digest of all."""
    first = [data[i : i + width][::-1].hex() for i in range(0, min(len(data), 8 * width), width)]
    return {"elements": len(data) // width, "first": first, "sha256": hashlib.sha256(data).hexdigest()}


def vector(seed: int, segments: list[list], scale_dtype: str, permuted: bool = False) -> dict[str, object]:
    """One weight of `segments` [n0, n1, k0, k1, bits, group_size, kind]."""
    n, k = max(s[1] for s in segments), max(s[3] for s in segments)
    stream = Stream(seed)
    words, scale_bytes, zero_bytes, zero_dtype = [], b"", b"", None
    dense = [[0.0] * k for _ in range(n)]
    for n0, n1, k0, k1, bits, size, kind in segments:
        rows, cols, groups = n1 - n0, k1 - k0, (k1 - k0) // size
        codes = [[stream.next() >> (32 - bits) for _ in range(cols)] for _ in range(rows)]
        scales = [[stream.real(scale_dtype) for _ in range(groups)] for _ in range(rows)]
        zeros = [[fixed_zero(bits, kind)] * groups] * rows
        if kind in ("int", "float", "min"):
            zero_dtype = "uint8" if kind == "int" else scale_dtype
            new = (lambda: stream.next() >> 24) if kind == "int" else (lambda: stream.real(scale_dtype))
            zeros = [[new() for _ in range(groups)] for _ in range(rows)]
            zero_bytes += b"".join(stored(v, zero_dtype) for v in pack_rows(zeros))
        words += pack_codes(codes, bits)
        scale_bytes += b"".join(stored(v, scale_dtype) for v in pack_rows(scales))
        for i in range(rows):
            for j in range(cols):
                column = (7 * (k0 + j) + 3) % k if permuted else k0 + j
                dense[n0 + i][column] = weight(codes[i][j], scales[i][j // size], zeros[i][j // size], kind)
    out: dict[str, object] = {
        "seed": seed,
        "layout": {
            "out_features": n,
            "in_features": k,
            "scale_dtype": scale_dtype,
            "permuted": permuted,
            "segments": segments,
        },
        "qweight": summary(struct.pack(f"<{len(words)}I", *words), 4),
        "scales": summary(scale_bytes, 4 if scale_dtype == "float32" else 2),
        "zeros": None,
        "dense": summary(struct.pack(f"<{n * k}f", *(v for row in dense for v in row)), 4),
    }
    if zero_dtype is not None:
        out["zeros"] = summary(zero_bytes, {"uint8": 1, "float32": 4}.get(zero_dtype, 2))
    return out


def vectors() -> list[dict[str, object]]:
    """Every width, kind and dtype; whole and ragged supertiles of every width; several segments."""
    out = []
    for bits in PLANES:
        for kind in KINDS:
            for dtype in DTYPES:
                out.append(vector(len(out) + 1, [[0, 65, 0, 12, bits, 4, kind]], dtype))
    for bits in PLANES:
        for n, k, size in ((64, 64, 64), (65, 80, 16)):
            out.append(vector(len(out) + 1, [[0, n, 0, k, bits, size, "none"]], "float16", permuted=bits % 2 == 0))
    for dtype, kinds in (("float16", ("int", "half")), ("bfloat16", ("float", "min")), ("float32", ("min", "none"))):
        one, other = kinds
        segments = [
            [0, 70, 0, 64, 3, 32, one],
            [0, 70, 64, 109, 8, 15, other],
            [70, 71, 0, 109, 2, 109, other],
            [71, 140, 0, 109, 5, 109, one],
        ]
        out.append(vector(len(out) + 1, segments, dtype, permuted=True))
    return out


def text() -> str:
    """The file."""
    rows = ",\n".join("  " + json.dumps(v) for v in vectors())
    return f'{{\n "comment": {json.dumps(COMMENT)},\n "vectors": [\n{rows}\n ]\n}}\n'


if __name__ == "__main__":
    print(text(), end="")
