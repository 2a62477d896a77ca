"""`mpq plan check`: what a plan makes of a model, weight by weight, with exact bytes."""

from __future__ import annotations

from ..options import JsonFlag, PlanFile, ShapesOf
from ..output import print_json
from .resolved import print_resolved, resolve_file, resolved_dict


def command(plan: PlanFile, model: ShapesOf, as_json: JsonFlag = False) -> None:
    """Apply a plan to MODEL without reading weights: every packed weight, its widths and exact bytes."""
    resolved, _, _ = resolve_file(plan, model)
    if as_json:
        print_json(resolved_dict(resolved))
    else:
        print_resolved(resolved)
