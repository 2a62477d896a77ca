"""Measured latencies of linears.

    {"device": "...", "entries": [{"out_features": 4096, "in_features": 4096, "bits": 3, "group_size": 64, "us": 7.4}]}

A table belongs to one device. It may say that more bits are faster: that happens, and the solvers do not mind. A shape
or choice that was not measured is refused, never guessed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, PlanError
from ..files.strict import parse_json
from .units import Choice, Unit

Key = tuple[int, int, int, int]  # out_features, in_features, bits, group_size
FIELDS = ("out_features", "in_features", "bits", "group_size")


@dataclass(frozen=True)
class LatencyTable:
    """device: in words. us: microseconds of (out_features, in_features, bits, group_size); kept: -1."""

    device: str
    us: dict[Key, float]

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a JSON file. Raises PlanError naming the file and the entry."""
        path = Path(path)
        try:
            data = parse_json(path.read_bytes(), str(path))
        except OSError as error:
            raise PlanError(f"{path}: the latency table cannot be read ({error.strerror or error})") from error
        except CheckpointError as error:
            raise PlanError(str(error)) from error
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: Any, where: str = "latency table") -> LatencyTable:
        """Check parsed JSON. Raises PlanError."""
        if not isinstance(data, dict) or not isinstance(data.get("entries"), list) or not data["entries"]:
            raise PlanError(f'{where}: must be an object with a device and a non-empty list "entries"')
        us: dict[Key, float] = {}
        for index, entry in enumerate(data["entries"]):
            at = f"{where}: entries[{index}]"
            if not isinstance(entry, dict) or any(type(entry.get(field)) is not int for field in FIELDS):
                raise PlanError(f"{at}: needs whole numbers {', '.join(FIELDS)}")
            value = entry.get("us")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise PlanError(f"{at}: us={value!r} is not a positive number of microseconds")
            key = (entry["out_features"], entry["in_features"], entry["bits"], entry["group_size"])
            if key in us:
                raise PlanError(f"{at}: repeats {dict(zip(FIELDS, key, strict=True))}")
            us[key] = float(value)
        return cls(str(data.get("device", "unnamed")), us)

    def to_json(self) -> str:
        """Text of the file."""
        entries = [dict(zip(FIELDS, key, strict=True)) | {"us": us} for key, us in self.us.items()]
        return json.dumps({"device": self.device, "entries": entries}, indent=1) + "\n"

    def of(self, unit: Unit, choice: Choice) -> float:
        """Microseconds of a unit's linears under one choice. Raises PlanError for what was not measured."""
        total = 0.0
        for cell in unit.cells:
            if not cell.is_whole:
                raise PlanError(
                    f"{unit.name}: is a part of a linear, and the latencies of {self.device} are those of whole ones; "
                    "choose granularity linear, fuse, expert or layer"
                )
            key = (cell.rows, cell.cols, choice.bits, -1 if choice.kept else choice.group_size)
            if key not in self.us:
                raise PlanError(
                    f"{unit.name}: the latencies of {self.device} have no entry for "
                    f"{dict(zip(FIELDS, key, strict=True))}; measure it, or leave that choice out"
                )
            total += self.us[key]
        return total


def costs(units: Iterable[Unit], table: LatencyTable) -> list[list[float]]:
    """Microseconds of every unit under each of its choices."""
    return [[table.of(unit, choice) for choice in unit.choices] for unit in units]
