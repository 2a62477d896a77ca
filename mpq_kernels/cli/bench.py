"""`mpq bench`: prompt and generation tokens per second of a packed, a dense, or a synthetic model."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .choices import OneOf
from .models import check_device, load_model, named_dtype
from .options import (
    ActivationsOption,
    BackendOption,
    CompileFlag,
    DeviceOption,
    DtypeOption,
    JsonFlag,
    QuietFlag,
    given,
)
from .output import note, print_json, progress, size_dict

if TYPE_CHECKING:
    from ..evaluate.speed import Measurement, ModelFacts
    from ..plan.plan import Plan

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")  # the last three are refused by the loader, in words


def command(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="DIR|config.json", help="Model directory, or config.json alone.")],
    plan: Annotated[Path | None, typer.Option(help="Plan as JSON: time synthetic weights packed under it.")] = None,
    bits: Annotated[
        int | None, typer.Option(min=1, max=16, help="Synthetic weights of one width: 1 to 8, or 16 (dense).")
    ] = None,
    group_size: Annotated[int, typer.Option(help="With --bits: codes along K that share a scale; -1: all.")] = 64,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Prompt lengths, such as 128,512; 0 for none.")] = "512",
    generate: Annotated[str, typer.Option("--generate", "-n", help="Generated tokens; 0 for none.")] = "128",
    batch_size: Annotated[str, typer.Option("--batch-size", "-b", help="Sequences at once.")] = "1",
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="Counted runs of each test.")] = 5,
    form: Annotated[
        str, typer.Option("--format", parser=OneOf(lambda: FORMATS), help="How the table on stdout is written.")
    ] = "md",
    device: DeviceOption = "cpu",
    backend: BackendOption = None,
    activations: ActivationsOption = "exact",
    dtype: DtypeOption = "auto",
    compile: CompileFlag = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch and of the CPU kernels.")] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure prompt (pp) and generation (tg) tokens per second: every length at every batch size."""
    prompts, generated = _numbers(prompt, "--prompt", 0), _numbers(generate, "--generate", 0)
    batches = _numbers(batch_size, "--batch-size", 1)
    _check_usage(ctx, plan, bits, as_json)
    if not prompts and not generated:
        raise typer.BadParameter("--prompt 0 and --generate 0 leave nothing to measure")
    import torch

    from ..evaluate.speed import ModelFacts, measure

    check_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    with progress("weights", hidden=quiet) as report:
        synthetic = _synthetic_plan(path, plan, bits, group_size)
        model, name = _open(path, synthetic, (device, dtype, backend, activations), report)
    if compile:
        from ..hf.compiled import compile_decoding

        compile_decoding(model)
    facts = ModelFacts.of(model)
    if name.endswith(" (synthetic)"):
        note("weights are synthetic: speed and sizes are real, what the model says is not", quiet)
    with progress("bench", hidden=quiet) as report:
        results = measure(model, prompts, generated, batches, repetitions, report)
    if as_json:
        print_json(_json(name, facts, results))
    else:
        FORMATS[form]([_row(name, facts, result) for result in results])


def _numbers(text: str, option: str, least: int) -> list[int]:
    """The positive integers of "128,512"; zeros, where allowed, mean none."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} {text}: give integers with commas between them, such as 128,512") from None
    if min(values) < least:
        raise typer.BadParameter(f"{option} {text}: {min(values)} is less than {least}")
    return [value for value in dict.fromkeys(values) if value]


def _check_usage(ctx: typer.Context, plan: Path | None, bits: int | None, as_json: bool) -> None:
    if plan is not None and bits is not None:
        raise typer.BadParameter("give --plan or --bits, not both")
    if bits is None and given(ctx, "group_size"):
        raise typer.BadParameter("--group-size goes with --bits")
    if as_json and given(ctx, "form"):
        raise typer.BadParameter("give --format or --json, not both")


def _synthetic_plan(path: Path, plan: Path | None, bits: int | None, group_size: int) -> Plan | None:
    """The plan that --plan or --bits asks for, None without them."""
    if plan is None and bits is None:
        return None
    from ..evaluate.synthetic import config_linears
    from ..plan.plan import Plan

    if plan is not None:
        return Plan.from_file(plan)
    return Plan.uniform(config_linears(path), bits=bits or 0, group_size=group_size)


def _open(path: Path, plan: Plan | None, how: tuple[str, str, str | None, str], report: Any) -> tuple[Any, str]:
    """(model, its name): the stored weights, or synthetic ones where a plan is given or nothing is stored.

    how: device, dtype, backend, activations.
    """
    from ..evaluate.synthetic import config_directory, synthetic_model

    directory = config_directory(path)
    name = directory.resolve().name
    stored = path.is_dir() and any(file.suffix in WEIGHTS for file in directory.iterdir())
    if plan is None and stored:
        return load_model(directory, *how), name
    device, dtype, backend, activations = how
    model = synthetic_model(path, plan, device, named_dtype(dtype), backend, progress=report, activations=activations)
    return model, f"{name} (synthetic)"


def _row(name: str, facts: ModelFacts, result: Measurement) -> dict[str, Any]:
    """One line of the table; numbers are plain."""
    return {
        "model": name,
        "params": facts.params,
        "packed_bytes": facts.packed.total_bytes,
        "kept_bytes": facts.kept_bytes,
        "bits_per_weight": round(facts.bits_per_weight, 4),
        "device": facts.device,
        "backend": facts.backend,
        "activations": facts.activations,
        "run": facts.run,
        "threads": facts.threads,
        "dtype": facts.dtype,
        "torch": facts.torch,
        "mpq_kernels": facts.version,
        "test": result.name,
        "batch": result.batch,
        "repetitions": len(result.seconds),
        "tokens_per_s": result.mean,
        "deviation": result.deviation,
    }


def _json(name: str, facts: ModelFacts, results: list[Measurement]) -> dict[str, Any]:
    about = {"model": name, **asdict(facts), "packed": size_dict(facts.packed)}
    about["bits_per_weight"] = facts.bits_per_weight
    tests = [
        {"test": r.name, "tokens": r.tokens, "batch": r.batch, "seconds": r.seconds}
        | {"tokens_per_s": r.mean, "deviation": r.deviation, "rates": r.rates}
        for r in results
    ]
    return {**about, "results": tests}


def _print_csv(rows: list[dict[str, Any]]) -> None:
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _print_markdown(rows: list[dict[str, Any]]) -> None:
    """A table for a report, aligned so that it can be read as it is."""
    cells = [[*_markdown_names(), "tokens/s"]]
    for row in rows:
        spread = "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
        words = [f"{row[key]:,}" if isinstance(row[key], int) else str(row[key]) for key in _markdown_names().values()]
        cells.append([*words, f"{row['tokens_per_s']:.2f}{spread}"])
    sizes = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for number, line in enumerate(cells):
        print("| " + " | ".join(cell.ljust(size) for cell, size in zip(line, sizes, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (size + 2) for size in sizes) + "|")


def _markdown_names() -> dict[str, str]:
    """Heading -> key of a row."""
    same = ("device", "backend", "activations", "run", "threads", "dtype", "torch", "mpq_kernels", "test", "batch")
    first = {"model": "model", "params": "params", "packed bytes": "packed_bytes", "bits/weight": "bits_per_weight"}
    return first | {name: name for name in same}


FORMATS: dict[str, Callable[[list[dict[str, Any]]], None]] = {"md": _print_markdown, "csv": _print_csv}
