"""`mpq export`: a packed directory for another program, a row of TARGETS: what writes it, and what it prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .choices import OneOf
from .options import JsonFlag, PackedDir
from .output import count, note, print_json, print_table


@dataclass(frozen=True)
class Request:
    """The options of the command, of which a target takes those that it knows."""

    out: Path
    made: Path


def _checkpoint(to: str, request: Request) -> dict[str, Any]:
    from ..exports.convert import export_checkpoint

    return export_checkpoint(request.out, request.made, to).to_dict()


def _print_checkpoint(data: dict[str, Any]) -> None:
    print_table(None, ["<linear", "<stored as"], [[name, says] for name, says in data["linears"].items()])
    for text in data["notes"]:
        note(text, False)
    print(
        f"{data['path']}: {count(len(data['linears']), 'linear')}, {count(len(data['kept']), 'kept tensor')}, files "
        f"{data['file_bytes']:,} bytes"
    )


CHECKPOINTS = ("bf16", "compressed-tensors", "gptq", "awq", "mlx")
# Target -> (what writes it and returns what --json prints, what prints it as a table).
TARGETS: dict[str, tuple[Callable[[Request], dict[str, Any]], Callable[[dict[str, Any]], None]]] = {
    name: (partial(_checkpoint, name), _print_checkpoint) for name in CHECKPOINTS
}


def command(
    out: PackedDir,
    made: Annotated[Path, typer.Argument(metavar="NEW", help="Directory to write; it must not exist.")],
    to: Annotated[str, typer.Option(parser=OneOf(lambda: TARGETS), help="What to write.")],
    as_json: JsonFlag = False,
) -> None:
    """Write the packed directory OUT in the form of another program, with the same weights: docs/exporting.md."""
    write, show = TARGETS[to]
    data = {"path": str(made), "to": to} | write(Request(out, made))
    if as_json:
        print_json(data)
    else:
        show(data)
