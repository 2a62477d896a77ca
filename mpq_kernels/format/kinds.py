"""Storage kinds: what a code of a segment means, and what is stored for it beside its scale. One row a kind.

    kind    zeros of a row and group    weight
    none    nothing                     (code - 2^(bits-1)) * scale        1 bit: (code - 1/2) * scale
    half    nothing                     (code - (2^bits - 1) / 2) * scale
    int     uint8                       (code - zero) * scale
    float   the dtype of the scales     (code - zero) * scale
    min     the dtype of the scales     code * scale + zero                 `zero` is the value of code 0

The two operations are two roundings in fp32. The layout's sizes, the reference, the quantizers and the header of the
C++ sources (setup.py) are made from this table; the position of a row is the number that operators and kernels receive.
docs/extending.md lists the files of a new kind. Standard library only: functions take tensors of any kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StorageKind:
    """One row. Tensors below: codes as floats [..., g], scale and zero [..., 1], all of one float dtype.

    stored: dtype of what `zeros` holds for each row and group: None, "uint8", or "scales" for the dtype of the scales.
    fixed: bits -> the zero point of a kind that stores none.
    decode: (codes, scale, zero) -> weights. steps: its inverse, (weights, scale, zero) -> codes, not rounded.
    magnitude: (codes, scale, zero) -> sum of the magnitudes of the terms that kernels add up for a weight.
    """

    name: str
    stored: str | None
    fixed: Callable[[int], float] | None
    says: str
    decode: Callable[[Any, Any, Any], Any]
    steps: Callable[[Any, Any, Any], Any]
    magnitude: Callable[[Any, Any, Any], Any]

    def zeros_dtype(self, scale_dtype: str) -> str | None:
        """Dtype of the tensor `zeros`, None where this kind has no part in it."""
        return scale_dtype if self.stored == "scales" else self.stored

    def zeros_count(self, scales: int) -> int:
        """Elements of `zeros` for a segment of so many scales."""
        return 0 if self.stored is None else scales

    def zero(self, bits: int, stored: Any) -> Any:
        """The zero point: what is stored, or what goes without saying."""
        return stored if self.fixed is None else self.fixed(bits)


def _from_zero(name: str, stored: str | None, fixed: Callable[[int], float] | None, zero: str) -> StorageKind:
    return StorageKind(
        name,
        stored,
        fixed,
        f"(code - {zero}) * scale",
        decode=lambda codes, scale, zero: (codes - zero) * scale,
        steps=lambda weights, scale, zero: weights / scale + zero,
        magnitude=lambda codes, scale, zero: (codes + abs(zero)) * abs(scale),
    )


KINDS: dict[str, StorageKind] = {
    kind.name: kind
    for kind in (
        # One bit is symmetric around 1/2, so that its two codes are -scale/2 and +scale/2; with 2^(bits-1) it could not
        # express a positive weight.
        _from_zero("none", None, lambda bits: 0.5 if bits == 1 else 2.0 ** (bits - 1), "2^(bits-1)"),
        _from_zero("half", None, lambda bits: (2.0**bits - 1) / 2, "(2^bits - 1) / 2"),
        _from_zero("int", "uint8", None, "zero"),
        _from_zero("float", "scales", None, "zero"),
        StorageKind(
            "min",
            "scales",
            None,
            "code * scale + zero",
            decode=lambda codes, scale, zero: codes * scale + zero,
            steps=lambda weights, scale, zero: (weights - zero) / scale,
            magnitude=lambda codes, scale, zero: codes * abs(scale) + abs(zero),
        ),
    )
}

# Names only. The position is the number that operators and kernels receive.
ZERO_KINDS = tuple(KINDS)
# Of these, the zero points that cost no bytes.
FIXED_KINDS = tuple(name for name, kind in KINDS.items() if kind.stored is None)
# Names that docs/format.md keeps for later, and for what.
RESERVED_KINDS = {"table": "codes that name one of up to 16 values"}


def kind_of(symmetric: bool, zero: str) -> str:
    """The kind that a rule of two words asks for: symmetric weights store no zero points."""
    return zero if zero in FIXED_KINDS or not symmetric else "none"


def why_not_kind(name: object) -> str | None:
    """Why `name` is no kind of this version; None where it is one."""
    if isinstance(name, str) and name in KINDS:
        return None
    if isinstance(name, str) and name in RESERVED_KINDS:
        return (
            f"zero={name!r} is reserved for {RESERVED_KINDS[name]}, which this version does not read: "
            "a newer mpq_kernels wrote it"
        )
    return f"zero={name!r} is not one of {ZERO_KINDS}"
