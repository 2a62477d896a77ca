"""`mpq plan sweep`: methods and budgets against uniform plans, as a table, JSON and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import PlanError
from ..models import read_text
from ..output import JsonFlag, ModelDir, QuietFlag, note, print_json, print_table, progress
from .allocate import (
    BitsOption,
    CalibrationOption,
    GranularityOption,
    GroupsOption,
    QuantizerOption,
    Setting,
    TokensOption,
)


def command(
    model: ModelDir,
    text: Annotated[Path, typer.Option(help="UTF-8 text that plans are evaluated on; not the calibration text.")],
    out: Annotated[Path, typer.Option(help="JSON file; what it holds already is not measured again.")],
    budgets: Annotated[str, typer.Option(help="Stored bits for each weight.")] = "2.5,3,4",
    methods: Annotated[
        str, typer.Option(help="Importance methods; `mpq plan methods` lists them.")
    ] = "frobenius,fisher",
    granularity: GranularityOption = "linear",
    bits: BitsOption = "1,2,3,4,5,6,8",
    group_sizes: GroupsOption = "64",
    calibration: CalibrationOption = None,
    calibration_tokens: TokensOption = 8192,
    quantizer: QuantizerOption = "hqq",
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text.")] = 20480,
    picture: Annotated[Path | None, typer.Option(help="PNG or SVG file to write (needs matplotlib).")] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Perplexity and KL of allocated and uniform plans over stored bits. Stop it and start it again as you like."""
    from ...allocate.methods import METHODS, check_method
    from ...allocate.sweep import Sweep, points

    values = _numbers(budgets)
    names = methods.split(",")
    for name in names:
        check_method(name)
    if calibration is None and any(METHODS[name].needs_text for name in names):
        raise PlanError(f"of {methods}, some look at activations, so there must be a text: --calibration FILE")
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
        sweep = Sweep(out, settings, study, tokenizer, read_text(text), max_tokens)
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


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise PlanError(f"--budgets {text!r} is not a list of numbers such as 2.5,3") from None
