"""Budgets: stored bytes, average stored bits, microseconds of a measured table, or a total loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import PlanError

KINDS = {
    "bytes": "stored bytes of the allocated linears",
    "bits": "stored bits for each of their weights: scales, zeros and padding included",
    "us": "microseconds of one pass over them, by a measured table",
    "error": "total loss; the fewest bytes that reach it are looked for",
}


@dataclass(frozen=True)
class Budget:
    """kind: one of KINDS. value: positive and finite, in that unit."""

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(f"budget kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if not (math.isfinite(self.value) and self.value > 0):
            raise PlanError(f"a budget of {self.value!r} {self.kind} is not a positive, finite number")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """ "2.5bits", "1500000bytes", "840us" or "0.02error"; a bare number is bits. Raises PlanError."""
        text = text.strip()
        kind = next((kind for kind in KINDS if text.endswith(kind)), "bits")
        number = text.removesuffix(kind).strip()
        try:
            value = float(number)
        except ValueError:
            raise PlanError(
                f"budget {text!r}: {number!r} is not a number; write 2.5bits, 150000bytes or 840us"
            ) from None
        return cls(kind, value)

    @property
    def text(self) -> str:
        """ "2.5bits"."""
        return f"{self.value:g}{self.kind}"

    def limit(self, weights: int) -> float:
        """The budget in bytes when it is one of bits or bytes, else as it is."""
        if self.kind == "bits":
            return math.floor(self.value * weights / 8)
        return math.floor(self.value) if self.kind == "bytes" else self.value
