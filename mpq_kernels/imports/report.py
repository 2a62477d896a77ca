"""What an import did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..packer.report import PackReport


@dataclass(frozen=True)
class ImportReport:
    """format: of the source. taken: linear -> how it is stored there. notes: what is not as the source says.

    packed: sizes, what was kept and why, and what was carried along.
    """

    format: str
    taken: dict[str, str]
    notes: tuple[str, ...]
    packed: PackReport

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        report = self.packed.to_dict()
        for module in report["modules"]:
            del module["errors"]  # there are none
        return {"format": self.format, "taken": self.taken, "notes": list(self.notes)} | report
