"""`mpq plan import`: a plan of another program, made into one of ours for a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from ..choices import OneOf
from ..options import JsonFlag, OutputOption, QuietFlag
from ..output import note, print_json, size_dict
from .resolved import model_linears


def _formats() -> Iterable[str]:
    from ...plan.foreign import AUTO, FORMATS

    return (AUTO, *FORMATS)


def command(
    foreign: Annotated[
        str, typer.Argument(metavar="FOREIGN", help="File of the plan; for quantmoe also the string itself.")
    ],
    model: Annotated[Path, typer.Option("--model", metavar="MODEL", help="Dense directory, or its config.json alone.")],
    form: Annotated[
        str, typer.Option("--from", parser=OneOf(_formats), help="Format of FOREIGN; auto: the only one it can be.")
    ] = "auto",
    output: OutputOption = None,
    group_size: Annotated[int | None, typer.Option(help="Where the format has none; -1 for all of K.")] = None,
    attention_bits: Annotated[int | None, typer.Option(help="mc-moe: width of q, k, v and o; 4 without it.")] = None,
    keep_floats: Annotated[
        bool, typer.Option("--keep-floats", help="Keep fp8, nvfp4 and the like in 16 bits.")
    ] = False,
    kept_experts: Annotated[
        int | None, typer.Option(help="Width, 1 to 8, of experts that FOREIGN keeps in 16 bits beside packed ones.")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Make a plan out of one of another program; say on stderr what was changed, dropped or reinterpreted."""
    from ...plan.foreign import read_foreign
    from ...plan.resolve import resolve

    linears, _ = model_linears(model)
    imported = read_foreign(
        foreign,
        form,
        linears,
        group_size=group_size,
        attention_bits=attention_bits,
        keep_floats=keep_floats,
        kept_experts=kept_experts,
    )
    if output is not None:
        imported.plan.to_file(output)
    if as_json:
        resolved = resolve(imported.plan, linears)
        notes = [{"kind": each.kind, "text": each.text, "modules": list(each.modules)} for each in imported.notes]
        facts = {"format": imported.format, "output": None if output is None else str(output), "notes": notes}
        print_json(facts | {"plan": imported.plan.model_dump(mode="json"), "packed": size_dict(resolved.size())})
        return
    for each in imported.notes:
        note(str(each), quiet)
    if output is None:
        print(imported.plan.to_json(), end="")
    else:
        note(f"wrote {output}, from a {imported.format} plan", quiet)
