"""`mpq plan allocate`: the plan that loses least within a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..choices import OneOf
from ..options import (
    CalibrationOption,
    GranularityOption,
    GroupsOption,
    JsonFlag,
    MethodOption,
    ModelDir,
    OutputOption,
    QuietFlag,
    TextFreeQuantizerOption,
    TokensOption,
    TowersOption,
    WidthsOption,
)
from ..output import note, print_json, progress
from .study import Setting

if TYPE_CHECKING:
    from ...allocate import Allocation, Limits


# The methods with and without a text when none is named; docs/allocation.md compares them all.
WITH_TEXT, WITHOUT_TEXT = "fisher", "frobenius"


def _solvers() -> Iterable[str]:
    from ...allocate import SOLVERS

    return SOLVERS


def command(
    model: ModelDir,
    budget: Annotated[str, typer.Option(help="2.5bits (stored, for each weight), 1500000bytes, 840us or 0.02error.")],
    output: OutputOption = None,
    method: MethodOption = None,
    granularity: GranularityOption = "linear",
    bits: WidthsOption = "1,2,3,4,5,6,8",
    group_sizes: GroupsOption = "64",
    calibration: CalibrationOption = None,
    calibration_tokens: TokensOption = 8192,
    quantizer: TextFreeQuantizerOption = "hqq",
    solver: Annotated[str, typer.Option(parser=OneOf(_solvers), help="exact needs highspy.")] = "fast",
    span: Annotated[int, typer.Option(help="Columns or rows of a unit, for granularity column and row.")] = 128,
    least: Annotated[list[str] | None, typer.Option(help="REGEX=BITS: the least width of these linears.")] = None,
    most: Annotated[list[str] | None, typer.Option(help="REGEX=BITS: the largest width of these linears.")] = None,
    latency: Annotated[Path | None, typer.Option(metavar="FILE", help="Table of `mpq plan latency`, for us.")] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Allocate token embeddings too.")] = False,
    refine: Annotated[int, typer.Option(min=0, help="Rounds of measuring around the plan; needs a text.")] = 0,
    towers: TowersOption = 16,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Write the plan of least loss within a budget that counts stored bytes: scales, zeros and padding included."""
    from ...allocate import Budget, LatencyTable, allocate
    from ...allocate.measured import refine as refined
    from ...allocate.methods import METHODS
    from ...plan.plan import WeightPlan, tower_rules

    wanted, table = Budget.parse(budget), None if latency is None else LatencyTable.from_file(latency)
    if calibration is None and refine:
        raise typer.BadParameter("--refine runs the model on a text: give --calibration FILE")
    chosen = method or (WITHOUT_TEXT if calibration is None else WITH_TEXT)
    row = METHODS[chosen]
    if row.needs_text and calibration is None:
        fit = ", ".join(name for name, other in METHODS.items() if not other.needs_text)
        raise typer.BadParameter(
            f"--method {chosen} looks at activations: give a text (--calibration FILE), or one of {fit}"
        )
    if embeddings and not row.embeddings:
        fit = ", ".join(name for name, other in METHODS.items() if other.embeddings)
        raise typer.BadParameter(f"--embeddings: --method {chosen} looks at inputs, which they do not have; use {fit}")
    if method is None and calibration is None:
        note(f"no text to run the model on (--calibration FILE), so the method is {chosen}: {row.summary}", quiet)
    setting = Setting(
        model, granularity, bits, group_sizes, quantizer, calibration, calibration_tokens, span, embeddings
    )
    with progress(chosen, hidden=as_json or quiet) as report:
        study, _ = setting.study(_limits(least, most), report)

        def solve(losses: Sequence[Sequence[float]]) -> Any:
            options: dict[str, Any] = {"solver": solver, "latency": table, "model": model.name}
            return allocate(study.linears, study.units, losses, wanted, **options)

        losses = row.run(study)
        got, kls = refined(study, losses, solve, refine) if refine else (solve(losses), [])
        rule = WeightPlan(bits=towers, group_size=setting.groups[0])
        got = replace(got, plan=got.plan.with_rules(tower_rules(study.linears, rule)))
    if output is not None:
        got.plan.to_file(output)
        each = f"{got.bpw:.4f} stored bits for each of {got.weights:,} weights"
        note(f"wrote {output}: {each}, {got.bytes:,} bytes", quiet)
    if as_json:
        print_json(_facts(got, chosen, kls, output))
    elif output is None:
        print(got.plan.to_json(), end="")


def _facts(got: Allocation, method: str, kls: Sequence[float], output: Path | None) -> dict[str, Any]:
    return {
        "output": None if output is None else str(output),
        "plan": got.plan.model_dump(mode="json"),
        "bytes": got.bytes,
        "bpw": got.bpw,
        "weights": got.weights,
        "loss": got.loss,
        "us": got.us,
        "method": method,
        "split_units": len(got.splits),
        "kl": list(kls),
    }


def _limits(least: Sequence[str] | None, most: Sequence[str] | None) -> Limits:
    """REGEX=BITS options. Raises typer.BadParameter, PlanError."""
    from ...allocate import Limits

    found: list[dict[str, int]] = []
    for option, words in (("--least", least or ()), ("--most", most or ())):
        rules = {}
        for word in words:
            pattern, _, bits = word.rpartition("=")
            if not pattern or not bits.isdigit():
                raise typer.BadParameter(f"{option} {word!r} is not REGEX=BITS, such as '.*down_proj=4'")
            rules[pattern] = int(bits)
        found.append(rules)
    return Limits(*found)
