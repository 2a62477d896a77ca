"""`mpq plan sweep`: methods and budgets against uniform plans, as a table, JSON and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..models import read_text
from ..options import (
    CalibrationOption,
    GranularityOption,
    GroupsOption,
    JsonFlag,
    MethodsOption,
    ModelDir,
    QuietFlag,
    TextFreeQuantizerOption,
    TokensOption,
    WidthsOption,
)
from ..output import note, print_json, print_table, progress
from .allocate import WITH_TEXT, WITHOUT_TEXT
from .study import Setting


def command(
    model: ModelDir,
    text: Annotated[
        Path, typer.Option(metavar="FILE", help="UTF-8 text that plans are evaluated on; not the calibration text.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="JSON file to write; what it holds already is not measured again."
        ),
    ],
    budgets: Annotated[str, typer.Option(help="Stored bits for each weight.")] = "2.5,3,4",
    methods: MethodsOption = None,
    granularity: GranularityOption = "linear",
    bits: WidthsOption = "1,2,3,4,5,6,8",
    group_sizes: GroupsOption = "64",
    calibration: CalibrationOption = None,
    calibration_tokens: TokensOption = 8192,
    quantizer: TextFreeQuantizerOption = "hqq",
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text.")] = 20480,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PNG or SVG file to write (needs matplotlib).")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Perplexity and KL of allocated and uniform plans over stored bits. Stop it and start it again as you like."""
    from ...allocate.methods import METHODS
    from ...allocate.sweep import Sweep, points

    values = _numbers(budgets)
    if methods is None and calibration is None:
        note(f"no text to run the model on (--calibration FILE), so the only method is {WITHOUT_TEXT}", quiet)
    names = _methods(methods, calibration)
    blind = [name for name in names if METHODS[name].needs_text and calibration is None]
    if blind:
        raise typer.BadParameter(f"--methods {','.join(blind)} looks at activations: give a text (--calibration FILE)")
    setting = Setting(model, granularity, bits, group_sizes, quantizer, calibration, calibration_tokens)
    with progress("sweep", hidden=as_json or quiet) as report:
        study, tokenizer = setting.study(report=report)
        settings = {
            "model": model.name,
            "granularity": granularity,
            "bits": bits,
            "group_sizes": group_sizes,
            "quantizer": quantizer,
            "text": text.name,
            "max_tokens": max_tokens,
            "calibration": None if calibration is None else calibration.name,
            "calibration_tokens": calibration_tokens,
        }
        sweep = Sweep(output, settings, study, tokenizer, read_text(text), max_tokens)
        sweep.run(names, values)
    if picture is not None:
        from ...allocate.chart import draw_frontier

        draw_frontier(sweep.data, picture)
        note(f"wrote {picture}", quiet)
    if as_json:
        print_json(sweep.data)
        return
    rows: list[list[Any]] = [
        [p["method"], p["budget"], p["bpw"], p["ppl"], p["kl"], p["top1"]] for p in points(sweep.data)
    ]
    print_table(
        f"original: perplexity {sweep.data['original_ppl']:.4f}",
        ["<plan", "budget", "stored bits", "perplexity", "KL", "top-1"],
        rows,
    )


def _methods(methods: str | None, calibration: Path | None) -> list[str]:
    """The methods that were asked for, else those that can be had."""
    if methods is not None:
        return methods.split(",")
    return [WITHOUT_TEXT] if calibration is None else [WITHOUT_TEXT, WITH_TEXT]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--budgets {text!r} is not a list of numbers such as 2.5,3") from None
