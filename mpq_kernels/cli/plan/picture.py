"""The widths of a plan as a picture: a row for each layer of the model, a column for each projection.

layer    q_proj  k_proj  v_proj  o_proj  ...
0             3       3       4     3.4          3.4: several widths, by their mean
1             3       3       4       3
lm_head                                   16     as it is
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError
from ...format.codes import KEPT_BITS
from ...format.layout import WeightLayout

if TYPE_CHECKING:
    from ...dense.checkpoint import LinearSpec
    from ...plan.resolve import ResolvedPlan

OTHER = "other"  # column of linears that stand in no numbered layer
# From few bits to many; the last is for kept weights.
COLOURS = {1: "#440154", 2: "#46327e", 3: "#365c8d", 4: "#277f8e", 5: "#1fa187", 6: "#4ac16d", 7: "#a0da39"}
COLOURS |= {8: "#fde725", KEPT_BITS: "#d0d0d0"}
INCHES = (0.75, 0.28)  # a cell of the PNG


@dataclass(frozen=True)
class Cell:
    """A linear, or the same linear of all experts. bits: the widths, each once, 16 for kept. mean: over weights."""

    names: tuple[str, ...]
    bits: tuple[int, ...]
    mean: float

    @property
    def text(self) -> str:
        """ "4" for one width, "3.4" for several."""
        return f"{self.mean:.1f}" if len(self.bits) > 1 else str(self.bits[0])

    @property
    def colour(self) -> str:
        """Background of the cell."""
        return COLOURS[KEPT_BITS if self.bits == (KEPT_BITS,) else min(8, max(1, round(self.mean)))]


@dataclass(frozen=True)
class Picture:
    """rows and columns in model order; cells by (row, column), absent where a layer has no such projection."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], Cell]

    @classmethod
    def of(cls, resolved: ResolvedPlan, linears: Sequence[LinearSpec]) -> Picture:
        """The picture of a plan that was resolved for these linears."""
        layouts = {member.spec.name: member.layout for weight in resolved.weights for member in weight.members}
        for weight in resolved.weights:
            if weight.embedding is not None:
                layouts |= dict.fromkeys(weight.embedding.shared, weight.layout)
        for name, spec in resolved.floats.items():
            layouts[name] = WeightLayout.uniform(spec.out_features, spec.in_features, 8, zero="none")
        linears = [spec for spec in linears if not spec.embedding or spec.name in layouts]
        members: dict[tuple[str, str], list[LinearSpec]] = {}
        for spec, place in zip(linears, _places([spec.name for spec in linears]), strict=True):
            members.setdefault(place, []).append(spec)
        cells = {place: _cell(specs, layouts) for place, specs in members.items()}
        rows, columns = dict.fromkeys(r for r, _ in cells), dict.fromkeys(c for _, c in cells if c != OTHER)
        other = (OTHER,) if any(column == OTHER for _, column in cells) else ()
        return cls(tuple(rows), (*columns, *other), cells)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: a row for each layer, with its linears by column."""
        rows = []
        for row in self.rows:
            found = {column: self.cells[row, column] for column in self.columns if (row, column) in self.cells}
            cells = {
                c: {"names": list(cell.names), "bits": list(cell.bits), "mean": cell.mean} for c, cell in found.items()
            }
            rows.append({"layer": row, "linears": cells})
        return {"columns": list(self.columns), "layers": rows}


def _cell(specs: Sequence[LinearSpec], layouts: Mapping[str, WeightLayout]) -> Cell:
    """What the linears of one place have in common."""
    bits: dict[int, None] = {}
    codes = weights = 0
    for spec in specs:
        count = spec.out_features * spec.in_features
        layout = layouts.get(spec.name)
        bits |= dict.fromkeys([KEPT_BITS] if layout is None else [segment.bits for segment in layout.segments])
        codes += count * KEPT_BITS if layout is None else layout.size().codes
        weights += count
    return Cell(tuple(spec.name for spec in specs), tuple(bits), codes / weights)


def _places(names: Sequence[str]) -> list[tuple[str, str]]:
    """(row, column) of each name, cut at its first number: "model.layers.3.mlp.up_proj" to ("3", "up_proj").

    The full text is kept where the short one would say the same of two things; experts share a column.
    """
    cut = []
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
        if at is None:
            cut.append((name, OTHER))
        else:
            rest = ["*" if part.isdigit() else part for part in parts[at + 1 :]]
            cut.append((".".join(parts[: at + 1]), ".".join(rest)))
    layers = list(dict.fromkeys(row for row, column in cut if column != OTHER))
    columns = list(dict.fromkeys(column for _, column in cut))
    short_rows = {row: row.rpartition(".")[2] for row in layers}
    short_columns = {column: column.rpartition(".")[2] for column in columns}
    if len(set(short_rows.values())) < len(layers):
        short_rows = {}
    if len(set(short_columns.values())) < len(columns):
        short_columns = {}
    return [(short_rows.get(row, row), short_columns.get(col, col)) for row, col in cut]


def print_picture(picture: Picture) -> None:
    """The picture on stdout, coloured where that is a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = None if sys.stdout.isatty() else 20 + sum(len(column) + 3 for column in picture.columns) + 40
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("layer", no_wrap=True)
    for column in picture.columns:
        table.add_column(column, justify="right")
    for row in picture.rows:
        cells = [picture.cells.get((row, column)) for column in picture.columns]
        texts = [Text("") if c is None else Text(f" {c.text} ", f"{_ink(c.colour)} on {c.colour}") for c in cells]
        table.add_row(Text(row), *texts)
    Console(file=sys.stdout, width=width, highlight=False).print(table)


def write_png(picture: Picture, path: Path, title: str) -> None:
    """The same as a PNG file. Raises UnsupportedError when matplotlib is not installed, OSError."""
    try:
        figure_class = importlib.import_module("matplotlib.figure").Figure
        rectangle = importlib.import_module("matplotlib.patches").Rectangle
    except ImportError as error:
        raise UnsupportedError(f"a PNG needs matplotlib ({error}): pip install 'mpq_kernels[plot]'") from None
    rows, columns = len(picture.rows), len(picture.columns)
    figure = figure_class(figsize=(2 + INCHES[0] * columns, 1 + INCHES[1] * rows), layout="tight", dpi=120)
    axes = figure.subplots()
    for (row, column), cell in picture.cells.items():
        x, y = picture.columns.index(column), picture.rows.index(row)
        axes.add_patch(rectangle((x, y), 1, 1, facecolor=cell.colour, edgecolor="white"))
        axes.text(x + 0.5, y + 0.5, cell.text, ha="center", va="center", color=_ink(cell.colour), fontsize=8)
    axes.set(xlim=(0, columns), ylim=(rows, 0), title=title)
    axes.set_xticks([i + 0.5 for i in range(columns)], picture.columns, rotation=30, ha="right", fontsize=8)
    axes.set_yticks([i + 0.5 for i in range(rows)], picture.rows, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(path, format="png")


def _ink(colour: str) -> str:
    """Black or white, whichever is read better on a background #rrggbb."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
