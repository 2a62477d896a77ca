"""The picture of a sweep: perplexity and KL over stored bits for each weight. Needs matplotlib."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError

KINDS = (".png", ".svg", ".pdf")


def draw_frontier(data: dict[str, Any], path: Path) -> None:
    """Write the points of a sweep as PNG or SVG: a line for each method, uniform plans as a dotted one, the original.

    Raises UnsupportedError without matplotlib and for another kind of file, OSError.
    """
    if path.suffix.lower() not in KINDS:
        raise UnsupportedError(f"{path}: a picture is one of {', '.join(KINDS)}")
    try:
        matplotlib, figures = (importlib.import_module(f"matplotlib{part}") for part in ("", ".figure"))
    except ImportError as error:
        raise UnsupportedError(f"a picture needs matplotlib ({error}): pip install 'mpq_kernels[plot]'") from None
    with matplotlib.rc_context({"axes.formatter.min_exponent": 5}):  # ticks in plain numbers: 28, not 2.8 x 10
        _figure(figures.Figure, data).savefig(path)


def _figure(figure_class: Any, data: dict[str, Any]) -> Any:
    lines: dict[str, list[dict[str, Any]]] = {}
    for point in sorted(data["points"].values(), key=lambda p: p["bpw"]):
        lines.setdefault(point["method"], []).append(point)
    figure = figure_class(figsize=(10, 4), layout="tight", dpi=110)
    for axes, key, label in zip(figure.subplots(1, 2), ("ppl", "kl"), ("perplexity", "KL, nats a token"), strict=True):
        for method, found in lines.items():
            style = {"linestyle": ":", "color": "gray", "marker": "x"} if method == "uniform" else {"marker": "o"}
            axes.plot([p["bpw"] for p in found], [p[key] for p in found], label=method, markersize=4, **style)
        if key == "ppl":
            axes.axhline(data["original_ppl"], color="black", linewidth=0.8, label="16 bits")
        axes.set(xlabel="stored bits for each weight", ylabel=label, yscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(str(data["settings"].get("model", "")), fontsize=10)
    return figure
