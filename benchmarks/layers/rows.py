"""What a measurement leaves behind: rows, their arithmetic, the printed table, the JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CPU_HEADS = f"{'median us':>10} {'min us':>10} {'GB/s':>6} {'of max':>6} {'bf16 /':>7}"
GPU_HEADS = f"{'median us':>10} {'spread':>6} {'GB/s':>6} {'floor us':>9} {'of floor':>8}  time of others / this time"
DENSE = ("bf16", "fp16")


@dataclass
class Row:
    """One layer at one number of tokens. us: microseconds of a call. over_bf16: bf16's time / this time."""

    shape: str
    tokens: int
    layer: str
    dtype: str
    weight_bytes: int
    copies: int
    calls: int = 0
    us_median: float | None = None
    us_min: float | None = None
    gbytes_per_s: float | None = None
    of_bandwidth: float | None = None
    over_bf16: float | None = None
    error: float | None = None
    reason: str | None = None

    def set_times(self, times: Sequence[float], bandwidth: float) -> None:
        """Fill in from microseconds of each call; bandwidth in GB/s."""
        self.calls, self.us_median, self.us_min = len(times), statistics.median(times), min(times)
        self.gbytes_per_s = self.weight_bytes / self.us_median / 1e3
        self.of_bandwidth = self.gbytes_per_s / bandwidth


@dataclass
class GpuRow(Row):
    """A row of a CUDA graph. calls: results of one graph; bandwidth: of a device copy, bytes read + written.

    us_again: median of a second timing of the same graph. spread: |us_again - us_median| / us_median. floor_us:
    weight_bytes at that bandwidth. of_floor: floor_us / us_median. over: layer -> its us_median / this us_median.
    backend: of packed layers, None for the first that serves.
    """

    width: str = ""
    backend: str | None = None
    replays: int = 0
    us_again: float | None = None
    spread: float | None = None
    floor_us: float | None = None
    of_floor: float | None = None
    arithmetic_us: float | None = None  # 2 M N K at the measured rate of a large bf16 product
    over: dict[str, float] = field(default_factory=dict)

    def set_graph_times(
        self, first: Sequence[float], again: Sequence[float], results: int, copy_bandwidth: float
    ) -> None:
        """Fill in from microseconds of each replay of a graph that makes `results` results."""
        self.set_times([us / results for us in first], copy_bandwidth)
        assert self.us_median is not None
        self.calls, self.replays = results, len(first)
        self.us_again = statistics.median(again) / results
        self.spread = abs(self.us_again - self.us_median) / self.us_median
        self.floor_us = self.weight_bytes / copy_bandwidth / 1e3
        self.of_floor = self.floor_us / self.us_median


def _comparable(width: str, other: str) -> bool:
    """Dense layers with all; packed ones with the same width, and mixed widths with all."""
    return not other or width == other or "|" in width or "|" in other


def set_ratios(rows: Sequence[GpuRow]) -> None:
    """`over` and `over_bf16` of every timed row: same shape, tokens and run, the same width or a dense layer."""
    cells: dict[tuple[str, int], list[GpuRow]] = {}
    for row in rows:
        if row.us_median is not None:
            cells.setdefault((row.shape, row.tokens), []).append(row)
    for cell in cells.values():
        for row in cell:
            assert row.us_median is not None
            others = [o for o in cell if o is not row and _comparable(row.width, o.width) and o.us_median]
            row.over = {o.layer: o.us_median / row.us_median for o in others if o.us_median}
            row.over_bf16 = 1.0 if row.layer == "bf16" else row.over.get("bf16")


def cpu_line(row: Row) -> str:
    """One line of the CPU's table."""
    head = f"{row.shape:18} {row.tokens:4} {row.layer:24} {row.dtype:9}"
    if row.us_median is None:
        return f"{head} {row.reason or ''}"
    ratio = "" if row.over_bf16 is None else f"{row.over_bf16:6.2f}x"
    return f"{head} {row.us_median:10.1f} {row.us_min:10.1f} {row.gbytes_per_s:6.1f} {row.of_bandwidth:6.0%} {ratio}"


def gpu_line(row: GpuRow) -> str:
    """One line of the GPU's table; a token is given in milliseconds."""
    head = f"{row.shape:18} {row.tokens:4} {row.layer:20} {row.dtype:8}"
    if row.us_median is None:
        return f"{head} {row.reason or ''}"
    ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row.over.items())
    whole = f" = {row.us_median / 1e3:.3f} ms" if row.shape.endswith("-token") else ""
    return (
        f"{head} {row.us_median:10.2f} {row.spread:6.1%} {row.gbytes_per_s:6.0f} {row.floor_us:9.2f} "
        f"{row.of_floor:8.0%}  {ratios}{whole}"
    )


def write_json(path: Path | None, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Replace the file at once, so that a run that is stopped leaves the last whole one."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    results = [asdict(row) for row in rows]
    for result in results:
        if result["error"] is not None and not math.isfinite(result["error"]):
            result["error"] = None  # JSON has no NaN; the reason says it
    part.write_text(json.dumps(about | {"results": results}, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def read_json(path: Path) -> tuple[dict[str, Any], list[GpuRow]]:
    """(facts, rows) of a file that `write_json` wrote for a GPU."""
    about = json.loads(path.read_text())
    return about, [GpuRow(**row) for row in about.pop("results")]
