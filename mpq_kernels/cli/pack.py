"""`mpq pack`: quantize and pack a dense model; `--dry-run` says how large it will be, without reading a weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .dry_run import dry_run
from .options import (
    EmbeddingsOption,
    GroupOption,
    HeadOption,
    JsonFlag,
    ModelDir,
    QuantizerOption,
    QuietFlag,
    ScaleOption,
    SymmetricFlag,
    TowersOption,
    ZeroOption,
    given,
)
from .output import count, fail, note, print_json, print_table, progress
from .plan.resolved import print_kept
from .plan.uniform import uniform_plan

if TYPE_CHECKING:
    from ..calibrate.calibration import Calibration
    from ..packer.report import PackReport

PROMPT = "Describe this image."
SHOWN = 5  # linears with groups of zeros that are named


def command(
    ctx: typer.Context,
    model: ModelDir,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")],
    bits: Annotated[int | None, typer.Option(min=1, max=8, help="One width for every linear layer, 1 to 8.")] = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Plan as JSON, instead of --bits.")] = None,
    group_size: GroupOption = 64,
    symmetric: SymmetricFlag = False,
    zero: ZeroOption = "int",
    scale_dtype: ScaleOption = "float16",
    lm_head: HeadOption = 16,
    towers: TowersOption = 16,
    embeddings: EmbeddingsOption = 16,
    quantizer: QuantizerOption = "hqq",
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text, for quantizers that look at one.")
    ] = None,
    calibration_images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pictures that the model is asked about, in place of a text.")
    ] = None,
    calibration_prompt: Annotated[str, typer.Option(help="What it is asked about each of them.")] = PROMPT,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of it that are used; 65,536 without it.")
    ] = None,
    act_order: Annotated[
        bool,
        typer.Option("--act-order", help="Let the quantizer choose the order of the columns; stored as a permutation."),
    ] = False,
    only_sizes: Annotated[bool, typer.Option("--dry-run", help="Exact bytes of every tensor; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older packed OUT when done.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what a killed run has finished.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Remove what a killed run has finished.")] = False,
    allow_dense: Annotated[
        bool, typer.Option("--allow-dense", help="Pack a model most of whose linears are not known as such.")
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Pack MODEL into the new directory OUT, with one width (--bits) or under a plan (--plan)."""
    _check_usage(ctx, bits, plan)
    if resume and restart:
        raise typer.BadParameter("--resume goes on with what a killed run has finished, --restart removes it: give one")
    if calibration is not None and calibration_images is not None:
        raise typer.BadParameter("give either --calibration or --calibration-images")
    read = calibration or calibration_images
    _check_calibration(quantizer, read, calibration_tokens, act_order, only_sizes)
    if plan is not None:
        from ..plan.plan import Plan

        chosen = Plan.from_file(plan)
    else:
        kept = {"lm_head": lm_head, "towers": towers, "embeddings": embeddings}
        chosen = uniform_plan(model, bits or 0, group_size, symmetric, zero, scale_dtype, **kept)
    if only_sizes:
        options = {"act_order": act_order, "overwrite": overwrite, "allow_dense": allow_dense, "as_json": as_json}
        dry_run(model, out, chosen, quantizer, read is not None, **options)
        return
    from ..packer.pack import pack

    text: Calibration | None = None
    if calibration is not None:
        text = _read_calibration(calibration, calibration_tokens, act_order)
    elif calibration_images is not None:
        text = _look_at(model, calibration_images, calibration_prompt, calibration_tokens, act_order)
    go_on = True if resume else False if restart else None
    with progress("packing", hidden=as_json or quiet) as step, notes_of_interrupts():
        report = pack(
            model, out, chosen, quantizer, text, overwrite, progress=step, resume=go_on, allow_dense=allow_dense
        )
    if as_json:
        print_json(report.to_dict())
        return
    _print_report(report)
    if resume:
        note(f"{report.resumed} of {report.parts} parts had been finished by an earlier run", quiet)
    for name, reason in report.left.items():
        note(f"not copied: {name} ({reason})", quiet)


@contextmanager
def notes_of_interrupts() -> Iterator[None]:
    """Say what was kept when the user interrupts, for which there is no other message."""
    try:
        yield
    except KeyboardInterrupt as stop:
        for text in getattr(stop, "__notes__", ()):
            fail(text)
        raise


def _check_usage(ctx: typer.Context, bits: int | None, plan: Path | None) -> None:
    """Exactly one of --bits and --plan; and the words that shape a uniform plan only go with --bits."""
    if (bits is None) == (plan is None):
        raise typer.BadParameter("give either --bits or --plan, exactly one of them")
    if plan is None:
        return
    for name in ("group_size", "symmetric", "zero", "scale_dtype", "lm_head", "towers", "embeddings"):
        if given(ctx, name):
            raise typer.BadParameter(f"--{name.replace('_', '-')} goes with --bits; a plan says it for each module")


def _check_calibration(
    quantizer: str, calibration: Path | None, tokens: int | None, act_order: bool, only_sizes: bool
) -> None:
    """--calibration with the quantizers that take it, and only with them; sizes can be asked for without it."""
    from ..quantize import QUANTIZERS

    row = QUANTIZERS[quantizer]
    if row.needs_calibration and calibration is None and not only_sizes:
        raise typer.BadParameter(f"--quantizer {quantizer} needs --calibration FILE, a UTF-8 text")
    if not row.takes_calibration and calibration is not None:
        raise typer.BadParameter(f"--quantizer {quantizer} uses no calibration; leave --calibration out")
    if act_order and not row.act_order:
        able = " or ".join(name for name, other in QUANTIZERS.items() if other.act_order)
        raise typer.BadParameter(f"--act-order goes with --quantizer {able}, not with {quantizer}")
    if tokens is not None and calibration is None:
        raise typer.BadParameter("--calibration-tokens goes with --calibration")


def _read_calibration(path: Path, tokens: int | None, act_order: bool) -> Calibration:
    from ..calibrate.calibration import Calibration

    limit = {} if tokens is None else {"max_tokens": tokens}
    return Calibration.from_file(path, act_order=act_order, **limit)


def _look_at(model: Path, folder: Path, prompt: str, tokens: int | None, act_order: bool) -> Calibration:
    """Every picture of a folder with the prompt, in the order of their names. Raises MPQError."""
    from ..calibrate.calibration import Calibration
    from .media import media_inputs, open_processor, pictures

    processor = open_processor(model)
    samples = [dict(media_inputs(processor, prompt, [path], [])) for path in pictures(folder)]
    limit: dict[str, Any] = {} if tokens is None else {"max_tokens": tokens}
    return Calibration(samples=samples, act_order=act_order, **limit)


def _print_report(report: PackReport) -> None:
    rows: list[list[object]] = []
    for module in report.modules:
        row: list[object] = [module.name, round(module.bits, 4), round(module.bpw, 4), module.bytes]
        rows.append([*row, max(module.errors.values(), default=0.0)])
    print_table(None, ["<module", "bits", "bpw", "bytes", "error"], rows)
    print_kept(report.kept)
    if report.large:
        large = [[parameter.name, parameter.elements, parameter.reason] for parameter in report.large]
        print_table("large parameters that were not packed", ["<parameter", "elements", "<reason"], large)
    if report.unreached:
        print(
            f"no calibration token reached {count(len(report.unreached), 'expert')}, calibrated on all that their "
            f"module reads: {', '.join(report.unreached)}"
        )
    if report.decoded:
        print(
            f"kept in 16 bits, though the source stores them in fewer: {count(len(report.decoded), 'tensor')}, "
            f"such as {report.decoded[0]}"
        )
    if report.zero_groups:
        names = list(report.zero_groups)
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        print(
            f"stored as zeros, since their weights are 0 or vanish in the dtype of the scales: "
            f"{count(sum(report.zero_groups.values()), 'group')} of {', '.join(names[:SHOWN])}{more}"
        )
    if report.unused:
        print(f"kept, though the model does not use them: {', '.join(report.unused)}")
    print(
        f"{report.out_dir}: {report.bpw:.4f} bits per packed weight; packed {report.packed.total_bytes:,} bytes, "
        f"kept {report.kept_bytes + report.bias_bytes:,}, files {report.file_bytes:,} (was {report.source_bytes:,})"
    )
