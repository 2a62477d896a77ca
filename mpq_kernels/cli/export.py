"""`mpq export`: a packed directory for another program, a row of TARGETS: what writes it, and what it prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .choices import OneOf
from .options import ActivationsOption, JsonFlag, PackedDir, PlainDtypeOption
from .output import count, note, print_json, print_table

ONNX_OPERATORS = ("auto", "nbits", "custom")
CHECKPOINTS = ("bf16", "compressed-tensors", "gptq", "awq", "mlx")


@dataclass(frozen=True)
class Request:
    """The options of the command, of which a target takes those that it knows."""

    out: Path
    made: Path
    operators: str
    dtype: str
    activations: str


def _onnx(request: Request) -> dict[str, Any]:
    from ..onnx import export_directory

    found = export_directory(request.out, request.made, request.operators, request.dtype, request.activations)
    return {"modules": [asdict(item) for item in found]}


def _print_onnx(data: dict[str, Any]) -> None:
    modules = data["modules"]
    rows = [[item["file"] or item["module"], ", ".join(item["operators"]) or item["reason"]] for item in modules]
    print_table(None, ["<file", "<operators"], rows)
    written = sum(item["file"] is not None for item in modules)
    print(f"{data['path']}: {count(written, 'model')} of {count(len(rows), 'packed module')}")


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


# Target -> (what writes it and returns what --json prints, what prints it as a table).
TARGETS: dict[str, tuple[Callable[[Request], dict[str, Any]], Callable[[dict[str, Any]], None]]] = {
    "onnx": (_onnx, _print_onnx),
} | {name: (partial(_checkpoint, name), _print_checkpoint) for name in CHECKPOINTS}


def command(
    out: PackedDir,
    made: Annotated[Path, typer.Argument(metavar="NEW", help="Directory to write; it must not exist.")],
    to: Annotated[str, typer.Option(parser=OneOf(lambda: TARGETS), help="What to write.")],
    operators: Annotated[
        str,
        typer.Option(
            parser=OneOf(lambda: ONNX_OPERATORS), help="onnx: what multiplies; auto is nbits where it is exact."
        ),
    ] = "auto",
    dtype: PlainDtypeOption = "float32",
    activations: ActivationsOption = "exact",
    as_json: JsonFlag = False,
) -> None:
    """Write the packed directory OUT for another program: docs/exporting.md, for onnx docs/plugging_in.md."""
    write, show = TARGETS[to]
    data = {"path": str(made), "to": to} | write(Request(out, made, operators, dtype, activations))
    if as_json:
        print_json(data)
    else:
        show(data)
