"""What every command prints with: tables and JSON on stdout, messages and progress on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..progress import Progress


def fail(message: str) -> int:
    """Print one message on stderr and return exit code 1."""
    print(f"mpq: {message}", file=sys.stderr)
    return 1


def note(message: str, quiet: bool) -> None:
    """A remark on stderr, unless quiet."""
    if not quiet:
        print(message, file=sys.stderr)


def count(number: int, noun: str) -> str:
    """ "1 file", "2 files", "1,000 files"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def print_json(data: Any) -> None:
    """One JSON object on stdout. NaN and Inf, which JSON does not have, become null."""
    print(json.dumps(_finite(data), indent=2, allow_nan=False))


def print_table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout. Columns whose name begins with "<" are left-aligned, the others are numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A pipe or a file has no width; there, 80 columns would cut module names in two.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200
    console = Console(file=sys.stdout, width=width, highlight=False)
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column.removeprefix("<"), justify="left" if column.startswith("<") else "right")
    for row in rows:
        table.add_row(*(escape(_cell(value)) for value in row))
    console.print(table)


@contextmanager
def progress(label: str, hidden: bool) -> Iterator[Progress | None]:
    """A progress bar on stderr; yields a function (done, total, what), or None when nothing is to be shown.

    hidden: --json or --quiet. Nothing is shown either when stderr is not a terminal.
    """
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars
    from rich.console import Console
    from rich.markup import escape

    columns = (
        bars.TextColumn(label),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[what]}"),
    )
    with bars.Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(label, total=None, what="")

        def report(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, what=escape(what))

        yield report


def size_dict(size: Any) -> dict[str, Any]:
    """A layout.SizeBreakdown in bytes by purpose, with its total and the stored bits for each weight."""
    parts = {name: getattr(size, name) / 8 for name in ("codes", "scales", "zeros", "metadata", "padding")}
    out: dict[str, Any] = {name: int(value) if value == int(value) else value for name, value in parts.items()}
    return out | {"total": size.total_bytes, "weights": size.weights, "bpw": size.bits_per_weight}


def widths(layout: Any) -> str:
    """Bits of a layout's segments, each once, in order: "3|4"."""
    return "|".join(dict.fromkeys(str(segment.bits) for segment in layout.segments))


def groups(layout: Any) -> str:
    """Group sizes of a layout's segments, each once, in order."""
    return "|".join(dict.fromkeys(str(segment.group_size) for segment in layout.segments))


def kinds(layout: Any) -> str:
    """Zero kinds of a layout's segments, each once, in order."""
    return "|".join(dict.fromkeys(segment.zero for segment in layout.segments))


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
