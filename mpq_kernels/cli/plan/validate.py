"""`mpq plan validate`: whether a plan is well formed, and whether it fits a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import JsonFlag, PlanFile
from ..output import count, print_json
from .resolved import resolve_file


def command(
    plan: PlanFile,
    model: Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="As for `plan check`.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say whether a plan is well formed and, with MODEL, whether it fits; exit code 1 and the reasons when not."""
    from ...plan.plan import Plan

    found = Plan.from_file(plan)
    facts: dict[str, Any] = {"plan": str(plan), "model": None, "rules": len(found.modules), "fuse": len(found.fuse)}
    if model is not None:
        resolved, _, _ = resolve_file(plan, model)
        facts |= {"model": str(model), "packed": len(resolved.weights), "kept": len(resolved.kept)}
    if as_json:
        print_json(facts)
    elif model is None:
        print(f"{plan}: well formed, {count(facts['rules'], 'rule')}; give MODEL to see whether it fits")
    else:
        packed, kept = count(facts["packed"], "packed weight"), count(facts["kept"], "linear")
        print(f"{plan}: fits {model}: {packed}, {kept} kept")
