"""`mpq plan show`: the widths of a plan as a picture (picture.py), in the terminal and as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import JsonFlag, PlanFile, ShapesOf
from ..output import print_json
from .resolved import resolve_file


def command(
    plan: PlanFile,
    model: ShapesOf,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the picture as a PNG file (needs matplotlib).")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """The widths as a picture: a row for each layer, a column for each projection; 16 is kept as it is."""
    from .picture import Picture, print_picture, write_png

    resolved, linears, _ = resolve_file(plan, model)
    picture = Picture.of(resolved, linears)
    if png is not None:
        write_png(picture, png, f"{plan.name}: {resolved.size().bits_per_weight:.3f} bits per packed weight")
    if as_json:
        print_json(picture.to_dict())
    else:
        print_picture(picture)
