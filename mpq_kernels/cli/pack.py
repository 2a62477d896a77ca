"""`mpq pack`: quantize and pack a dense model; `--dry-run` says how large it will be, without reading a weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import JsonFlag, ModelDir, QuietFlag, note, print_json, print_table, progress, size_dict
from .plan import GroupOption, HeadOption, ScaleOption, SymmetricFlag, ZeroOption, print_kept, uniform_plan

if TYPE_CHECKING:
    from ..plan import Plan
    from ..report import PackReport


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
        str, typer.Option(help="rtn (round to nearest) or hqq (search for scales and zeros).")
    ] = "hqq",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Exact bytes of every tensor; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older packed OUT when done.")] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Pack MODEL into the new directory OUT, with one width (--bits) or under a plan (--plan)."""
    _check_usage(ctx, bits, plan)
    if plan is not None:
        from ..plan import Plan

        chosen = Plan.from_file(plan)
    else:
        chosen = uniform_plan(model, bits or 0, group_size, symmetric, zero, scale_dtype, lm_head)
    if dry_run:
        _dry_run(model, chosen, as_json)
        return
    from ..pack import pack

    with progress("packing", hidden=as_json or quiet) as report_progress:
        report = pack(model, out, chosen, quantizer=quantizer, overwrite=overwrite, progress=report_progress)
    if as_json:
        print_json(report.to_dict())
        return
    _print_report(report)
    for name, reason in report.left.items():
        note(f"not copied: {name} ({reason})", quiet)


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


def _dry_run(model: Path, plan: Plan, as_json: bool) -> None:
    from ..layout import DTYPE_BYTES
    from ..resolve import resolve
    from ..source import SourceCheckpoint

    source = SourceCheckpoint.open(model)
    resolved = resolve(plan, source.linears())
    tensors: list[dict[str, Any]] = []
    for weight in resolved.weights:
        for key, (dtype, shape) in weight.layout.tensor_specs().items():
            size = DTYPE_BYTES[dtype] * shape[0]
            tensors.append({"name": f"{weight.name}.{key}", "dtype": dtype, "shape": list(shape), "bytes": size})
    dense = {member.spec.tensor for weight in resolved.weights for member in weight.members}
    # The input embedding is read by row, so it stays even where the head that shares it is packed.
    replaced = dense - {source.model_map.tied_source}
    kept = sum(tensor.entry.nbytes for name, tensor in source.tensors.items() if name not in replaced)
    before = sum(source.tensors[name].entry.nbytes for name in dense)
    total = resolved.size()
    if as_json:
        summary = {"packed": size_dict(total), "dense_bytes": before, "kept_bytes": kept}
        print_json(summary | {"total_bytes": total.total_bytes + kept, "tensors": tensors, "kept": resolved.kept})
        return
    rows = [[t["name"], t["dtype"], t["shape"][0], t["bytes"]] for t in tensors]
    print_table("dry run: nothing is written", ["<tensor", "<dtype", "elements", "bytes"], rows)
    print_kept(resolved.kept)
    print(
        f"packed {before:,} -> {total.total_bytes:,} bytes ({total.bits_per_weight:.4f} bits per weight), "
        f"kept {kept:,} bytes, together {total.total_bytes + kept:,} bytes of tensors"
    )


def _print_report(report: PackReport) -> None:
    rows: list[list[object]] = []
    for module in report.modules:
        row: list[object] = [module.name, round(module.bits, 4), round(module.bpw, 4), module.bytes]
        rows.append([*row, max(module.errors.values(), default=0.0)])
    print_table(None, ["<module", "bits", "bpw", "bytes", "error"], rows)
    print_kept(report.kept)
    print(
        f"{report.out_dir}: {report.bpw:.4f} bits per packed weight; packed {report.packed.total_bytes:,} bytes, "
        f"kept {report.kept_bytes + report.bias_bytes:,}, files {report.file_bytes:,} (was {report.source_bytes:,})"
    )
