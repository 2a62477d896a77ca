"""`mpq plan latency`: the table of measured microseconds that a budget in us needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..models import check_device
from ..options import DeviceOption, GroupsOption, JsonFlag, PlainDtypeOption, QuietFlag, ShapesOf, WidthsOption
from ..output import note, print_json, progress
from .study import whole_numbers


def command(
    model: ShapesOf,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON file to write.")],
    bits: WidthsOption = "1,2,3,4,5,6,8",
    group_sizes: GroupsOption = "64",
    device: DeviceOption = "cpu",
    dtype: PlainDtypeOption = "bfloat16",
    tokens: Annotated[int, typer.Option(min=1, help="Rows of x.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Turns through all entries.")] = 3,
    seconds: Annotated[float, typer.Option(help="Time for each entry in each turn.")] = 0.1,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure every shape of a model under every width and group size, through the layers that would run here.

    Random weights are used: the model's own are not read.
    """
    import torch

    from ...allocate import make_choices
    from ...allocate.timing import measure_latencies
    from ...dense.checkpoint import COMPUTE_DTYPES
    from ...evaluate.synthetic import config_linears
    from ...files.strict import replace_file

    check_device(device)
    choices = make_choices(whole_numbers(bits, "--bits"), whole_numbers(group_sizes, "--group-sizes"))
    linears = config_linears(model)
    with progress("latency", hidden=as_json or quiet) as report:
        table, spread = measure_latencies(
            linears, choices, device=torch.device(device), dtype=COMPUTE_DTYPES[dtype], tokens=tokens, rounds=rounds,
            seconds=seconds, progress=report,
        )  # fmt: skip
    replace_file(output, table.to_json().encode())
    what = f"{len(table.us)} entries of {table.device}; rounds differ by up to {spread:.0%} of an entry"
    note(f"wrote {output}: {what}", quiet)
    if as_json:
        print_json(json.loads(table.to_json()) | {"spread": spread})
