"""`mpq pack`: quantize and pack a dense model; `--dry-run` says how large it will be, without reading a weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import JsonFlag, ModelDir, QuietFlag, fail, note, print_json, print_table, progress, size_dict
from .plan import GroupOption, HeadOption, ScaleOption, SymmetricFlag, ZeroOption, print_kept, uniform_plan

if TYPE_CHECKING:
    from ..calibrate.calibration import Calibration
    from ..packer.report import PackReport
    from ..plan.plan import Plan


def command(
    ctx: typer.Context,
    model: ModelDir,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")],
    bits: Annotated[int | None, typer.Option(min=1, max=8, help="One width for every linear layer, 1 to 8.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan as JSON, instead of --bits.")] = None,
    group_size: GroupOption = 64,
    symmetric: SymmetricFlag = False,
    zero: ZeroOption = "int",
    scale_dtype: ScaleOption = "float16",
    lm_head: HeadOption = 16,
    quantizer: Annotated[
        str,
        typer.Option(
            help="rtn (round to nearest), hqq (search for scales and zeros), gptq or auto-round (need --calibration)."
        ),
    ] = "hqq",
    calibration: Annotated[
        Path | None, typer.Option(help="UTF-8 text that gptq and auto-round read, and hqq if given.")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of it that are used.  [default: 65536]", show_default=False)
    ] = None,
    act_order: Annotated[
        bool, typer.Option("--act-order", help="Let gptq choose the order of the columns; stored as a permutation.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Exact bytes of every tensor; write nothing.")] = False,
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
    _check_calibration(quantizer, calibration, calibration_tokens, act_order, dry_run)
    if plan is not None:
        from ..plan.plan import Plan

        chosen = Plan.from_file(plan)
    else:
        chosen = uniform_plan(model, bits or 0, group_size, symmetric, zero, scale_dtype, lm_head)
    if dry_run:
        _dry_run(model, chosen, quantizer, calibration, act_order, as_json)
        return
    from ..packer.pack import pack

    text = None if calibration is None else _read_calibration(calibration, calibration_tokens, act_order)
    go_on = True if resume else False if restart else None
    with progress("packing", hidden=as_json or quiet) as step, _notes_of_interrupts():
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
def _notes_of_interrupts() -> Iterator[None]:
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
    for name in ("group_size", "symmetric", "zero", "scale_dtype", "lm_head"):
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} goes with --bits; a plan says it for each module")


def _check_calibration(
    quantizer: str, calibration: Path | None, tokens: int | None, act_order: bool, dry_run: bool
) -> None:
    """--calibration with the quantizers that take it, and only with them; sizes can be asked for without it."""
    from ..quantize import quantizer as quantizer_row

    row = quantizer_row(quantizer)
    if row.needs_calibration and calibration is None and not dry_run:
        raise typer.BadParameter(f"--quantizer {quantizer} needs --calibration FILE, a UTF-8 text")
    if not row.takes_calibration and calibration is not None:
        raise typer.BadParameter(f"--quantizer {quantizer} uses no calibration; leave --calibration out")
    if act_order and row.name != "gptq":
        raise typer.BadParameter(f"--act-order goes with --quantizer gptq, not with {quantizer}")
    if tokens is not None and calibration is None:
        raise typer.BadParameter("--calibration-tokens goes with --calibration")


def _read_calibration(path: Path, tokens: int | None, act_order: bool) -> Calibration:
    from ..calibrate.calibration import Calibration

    limit = {} if tokens is None else {"max_tokens": tokens}
    return Calibration.from_file(path, act_order=act_order, **limit)


def _dry_run(model: Path, plan: Plan, quantizer: str, calibration: Path | None, act_order: bool, as_json: bool) -> None:
    """What `pack` would write: the same job, of which only the sizes are asked."""
    from ..calibrate.experts import in_walk_order
    from ..dense.checkpoint import DenseCheckpoint
    from ..files.safetensors import file_bytes, nbytes
    from ..packer.job import PackJob, in_free_order
    from ..packer.pack import MAX_SHARD_BYTES, check_calibratable
    from ..plan.resolve import resolve
    from ..quantize import quantizer as quantizer_row

    source = DenseCheckpoint.open(model)
    resolved = resolve(plan, source.linears())
    check_calibratable(resolved, quantizer)
    if act_order:
        resolved = in_free_order(resolved)
    row = quantizer_row(quantizer)
    if (row.needs_calibration or calibration is not None) and not row.whole_model:
        resolved = in_walk_order(resolved, source)
    shards = PackJob(source, resolved, row.name, None).shards(MAX_SHARD_BYTES)
    tensors: list[dict[str, Any]] = [
        {
            "name": name,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(shape),
            "bytes": nbytes((dtype, shape)),
        }
        for shard in shards
        for name, (dtype, shape) in shard.specs.items()
    ]
    files = {shard.name: file_bytes(shard.specs) for shard in shards}
    total, together = resolved.size(), sum(tensor["bytes"] for tensor in tensors)
    before = sum(tensor.entry.nbytes for tensor in source.tensors.values())
    if as_json:
        summary = {"packed": size_dict(total), "total_bytes": together, "source_bytes": before}
        print_json(summary | {"files": files, "tensors": tensors, "kept": resolved.kept})
        return
    rows = [[t["name"], t["dtype"], " x ".join(map(str, t["shape"])), t["bytes"]] for t in tensors]
    print_table("dry run: nothing is written", ["<tensor", "<dtype", "<shape", "bytes"], rows)
    print_kept(resolved.kept)
    print_table(None, ["<file", "bytes"], list(files.items()))
    print(
        f"packed {total.total_bytes:,} bytes at {total.bits_per_weight:.4f} bits per weight, "
        f"all tensors {together:,} bytes (was {before:,}), files {sum(files.values()):,}"
    )


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
            f"no calibration token reached {len(report.unreached)} experts, which were calibrated on all that their "
            f"module reads: {', '.join(report.unreached)}"
        )
    print(
        f"{report.out_dir}: {report.bpw:.4f} bits per packed weight; packed {report.packed.total_bytes:,} bytes, "
        f"kept {report.kept_bytes + report.bias_bytes:,}, files {report.file_bytes:,} (was {report.source_bytes:,})"
    )
