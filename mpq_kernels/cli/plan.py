"""`mpq plan uniform` writes a plan with one width; `mpq plan check` shows what a plan does to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import JsonFlag, ModelDir, groups, kinds, note, print_json, print_table, size_dict, widths

if TYPE_CHECKING:
    from ..plan import Plan
    from ..resolve import ResolvedPlan

app = typer.Typer(help="Write a uniform plan, or check a plan against a model.", no_args_is_help=True)

BitsOption = Annotated[int, typer.Option(min=1, max=8, help="Width of every linear layer, 1 to 8.")]
GroupOption = Annotated[int, typer.Option(help="Codes along K that share a scale; -1 for all of K.")]
SymmetricFlag = Annotated[bool, typer.Option("--symmetric", help="No zero points.")]
ZeroOption = Annotated[str, typer.Option(help="Kind of zero points: int or float.")]
ScaleOption = Annotated[str, typer.Option(help="Dtype of the scales: float16, bfloat16 or float32.")]
HeadOption = Annotated[int, typer.Option(help="Width of the output head; 16 keeps it as it is.")]


def uniform_plan(
    model: Path, bits: int, group_size: int, symmetric: bool, zero: str, scale_dtype: str, lm_head: int
) -> Plan:
    """Plan.uniform from command-line words, which Plan itself checks. Raises PlanError, CheckpointError."""
    from ..plan import Plan

    words: dict[str, Any] = {"zero": zero, "scale_dtype": scale_dtype}
    return Plan.uniform(model, bits=bits, group_size=group_size, symmetric=symmetric, lm_head=lm_head, **words)


@app.command("uniform")
def uniform(
    model: ModelDir,
    bits: BitsOption,
    group_size: GroupOption = 64,
    symmetric: SymmetricFlag = False,
    zero: ZeroOption = "int",
    scale_dtype: ScaleOption = "float16",
    lm_head: HeadOption = 16,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; stdout without it.")] = None,
) -> None:
    """Write a plan that gives every linear layer of MODEL one width."""
    from ..resolve import resolve
    from ..source import SourceCheckpoint

    plan = uniform_plan(model, bits, group_size, symmetric, zero, scale_dtype, lm_head)
    resolve(plan, SourceCheckpoint.open(model).linears())  # refuses a group size that does not divide some K
    if output is None:
        print(plan.to_json(), end="")
        return
    plan.to_file(output)
    note(f"wrote {output}", quiet=False)


@app.command("check")
def check(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan as JSON.")],
    model: ModelDir,
    as_json: JsonFlag = False,
) -> None:
    """Apply a plan to MODEL without reading weights: every packed weight, its widths and exact bytes."""
    from ..plan import Plan
    from ..resolve import resolve
    from ..source import SourceCheckpoint

    resolved = resolve(Plan.from_file(plan_file), SourceCheckpoint.open(model).linears())
    if as_json:
        print_json(resolved_dict(resolved))
    else:
        print_resolved(resolved)


def resolved_dict(resolved: ResolvedPlan) -> dict[str, Any]:
    """What a plan makes of a model, in JSON: packed weights with layout and bytes, kept linears, totals."""
    modules = [
        {
            "name": weight.name,
            "members": [member.spec.name for member in weight.members],
            "layout": weight.layout.to_dict(),
            "bytes": size_dict(weight.layout.size()),
        }
        for weight in resolved.weights
    ]
    return {"modules": modules, "kept": resolved.kept, "total": size_dict(resolved.size())}


def print_resolved(resolved: ResolvedPlan) -> None:
    """The same as a table."""
    rows: list[list[object]] = []
    for weight in resolved.weights:
        layout = weight.layout
        shape = f"{layout.out_features} x {layout.in_features}"
        size = layout.size()
        row = [weight.name, shape, widths(layout), groups(layout), kinds(layout)]
        rows.append([*row, round(size.bits_per_weight, 4), size.total_bytes])
    total = resolved.size()
    rows.append(["total", "", "", "", "", round(total.bits_per_weight, 4), total.total_bytes])
    print_table(None, ["<module", "<shape", "<bits", "<group", "<zeros", "bpw", "bytes"], rows)
    print_kept(resolved.kept)


def print_kept(kept: dict[str, str]) -> None:
    """Kept linears with their reasons."""
    if kept:
        print_table(None, ["<kept", "<reason"], list(kept.items()))
