"""`mpq import`: a checkpoint that another program quantized becomes a packed one, without quantizing again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .choices import OneOf
from .options import JsonFlag, QuietFlag
from .output import count, note, print_json, print_table, progress
from .pack import notes_of_interrupts
from .plan.resolved import print_kept

if TYPE_CHECKING:
    from ..imports.report import ImportReport


def _formats() -> Iterable[str]:
    from ..imports.formats import AUTO, FORMATS

    return (AUTO, *FORMATS)


def command(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a quantized model, with safetensors.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")],
    form: Annotated[
        str, typer.Option("--from", parser=OneOf(_formats), help="Format of DIR; auto: the only one it can be.")
    ] = "auto",
    fuse: Annotated[
        bool, typer.Option("--fuse", help="One packed weight for q, k and v, and for gate and up, where they agree.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older packed OUT when done.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what a killed run has finished.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Remove what a killed run has finished.")] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Pack the quantized model DIR into the new directory OUT: the same weights, bit for bit."""
    if resume and restart:
        raise typer.BadParameter("--resume goes on with what a killed run has finished, --restart removes it: give one")
    from ..imports.convert import import_checkpoint

    go_on = True if resume else False if restart else None
    with progress("importing", hidden=as_json or quiet) as step, notes_of_interrupts():
        report = import_checkpoint(model, out, form, overwrite, progress=step, resume=go_on, fuse=fuse)
    if as_json:
        print_json(report.to_dict())
        return
    _print_report(report)
    if resume:
        note(f"{report.packed.resumed} of {report.packed.parts} parts had been finished by an earlier run", quiet)
    for text in report.notes:
        note(text, quiet)
    for name, reason in report.packed.left.items():
        note(f"not copied: {name} ({reason})", quiet)


def _print_report(report: ImportReport) -> None:
    packed = report.packed
    rows: list[list[object]] = []
    for module in packed.modules:
        stored = " | ".join(dict.fromkeys(report.taken[name] for name in module.members))
        rows.append([module.name, stored, round(module.bits, 4), round(module.bpw, 4), module.bytes])
    print_table(None, ["<module", "<in the source", "bits", "bpw", "bytes"], rows)
    print_kept(packed.kept)
    if packed.decoded:
        print(
            f"kept dense, though the source stores them quantized: {count(len(packed.decoded), 'tensor')}, such as "
            f"{packed.decoded[0]}"
        )
    if packed.unused:
        print(f"kept, though the model does not use them: {', '.join(packed.unused)}")
    print(
        f"{packed.out_dir}: from {report.format}; {packed.bpw:.4f} bits per packed weight; packed "
        f"{packed.packed.total_bytes:,} bytes, kept {packed.kept_bytes + packed.bias_bytes:,}, files "
        f"{packed.file_bytes:,} (was {packed.source_bytes:,})"
    )
