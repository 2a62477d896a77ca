"""The fraction of the floor against the number of tokens, one line for each layer, one panel for each shape.

python benchmarks/layers/plot.py RESULTS.json [OUT.png]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = 3
STYLES = {"cuda": ("o", "-"), "triton": ("^", "-."), "peer": ("x", "--")}  # marker and line


def series(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """shape -> layer -> [(tokens, fraction of the floor), ...] of the rows that have a number."""
    out: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in results:
        if row.get("of_floor") is not None:
            out.setdefault(row["shape"], {}).setdefault(row["layer"], []).append((row["tokens"], row["of_floor"]))
    return {shape: {layer: sorted(points) for layer, points in layers.items()} for shape, layers in out.items()}


def style(layer: str) -> str:
    """Whose kernels a layer of the table runs: a key of STYLES."""
    if not layer.startswith("packed"):
        return "peer"
    return "triton" if "triton" in layer else "cuda"


def plot(data: dict[str, Any], path: Path) -> str | None:
    """Write the picture; None, or the reason why there is none."""
    shapes = series(data["results"])
    if not shapes:
        return "no row has a fraction of the floor"
    try:
        import matplotlib
    except ImportError as error:
        return f"{error} (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(shapes) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(6 * COLUMNS, 4.2 * rows), squeeze=False)
    for axis, (shape, layers) in zip(axes.flat, shapes.items(), strict=False):
        for layer, points in layers.items():
            marker, line = STYLES[style(layer)]
            axis.plot(*zip(*points, strict=True), label=layer, marker=marker, ls=line, lw=1)
        axis.set(title=shape, xlabel="M (tokens)", ylabel="weight bytes / copy bandwidth / time", xscale="log")
        axis.set_ylim(0, 1.05)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6, ncol=2)
    for axis in axes.flat[len(shapes) :]:
        axis.set_axis_off()
    figure.suptitle(f"{', '.join(data.get('gpus') or ['?'])}, commit {data.get('commit')}, {data.get('date')}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return None


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(f"usage: {sys.argv[0]} RESULTS.json [OUT.png]")
    source = Path(sys.argv[1])
    reason = plot(
        json.loads(source.read_text()), Path(sys.argv[2]) if len(sys.argv) == 3 else source.with_suffix(".png")
    )
    sys.exit(f"plot.py: {reason}" if reason else 0)
