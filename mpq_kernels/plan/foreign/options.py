"""What a caller may choose beside the foreign file, and which format has a use for it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...errors import PlanError


@dataclass(frozen=True)
class Options:
    """None and False: not chosen.

    group_size: columns that share a scale, for formats whose files do not say. attention_bits: of q, k, v and o, where
    a file is about experts alone. keep_floats: keep weights in 16 bits that a file wants in a float type.
    kept_experts: bits for single experts that a file keeps in 16 bits beside packed ones.
    """

    group_size: int | None = None
    attention_bits: int | None = None
    keep_floats: bool = False
    kept_experts: int | None = None

    def check(self, name: str, known: frozenset[str]) -> None:
        """Raise PlanError for a choice that format `name` has no use for."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value is not False and field.name not in known | {"kept_experts"}:
                raise PlanError(
                    f"{field.name}={value}: {name} files say that themselves or have no such thing; leave it out"
                )
        if self.kept_experts is not None and not 1 <= self.kept_experts <= 8:
            raise PlanError(f"kept_experts={self.kept_experts} is not a width 1..8")
