"""`mpq plan`: write a uniform plan, check one, see its widths, its size, and how two plans differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..output import JsonFlag, groups, kinds, note, print_json, print_table, size_dict, widths

if TYPE_CHECKING:
    from ...dense.checkpoint import LinearSpec
    from ...plan.plan import Plan
    from ...plan.resolve import ResolvedMember, ResolvedPlan

app = typer.Typer(help="Write a plan, check it against a model, and look at what it does.", no_args_is_help=True)

PURPOSES = ("codes", "scales", "zeros", "metadata", "padding")
KEPT: dict[str, Any] = {"bits": "16"}  # how `diff` describes a linear that no plan packs
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="Plan as JSON.")]
ShapesOf = Annotated[Path, typer.Argument(metavar="MODEL", help="Dense model directory, or its config.json alone.")]

BitsOption = Annotated[int, typer.Option(min=1, max=8, help="Width of every linear layer, 1 to 8.")]
GroupOption = Annotated[int, typer.Option(help="Codes along K that share a scale; -1 for all of K.")]
SymmetricFlag = Annotated[bool, typer.Option("--symmetric", help="No zero points.")]
ZeroOption = Annotated[str, typer.Option(help="Kind of zero points: int or float.")]
ScaleOption = Annotated[str, typer.Option(help="Dtype of the scales: float16, bfloat16 or float32.")]
HeadOption = Annotated[int, typer.Option(help="Width of the output head; 16 keeps it as it is.")]


def uniform_plan(
    model: Path | Sequence[LinearSpec],
    bits: int,
    group_size: int,
    symmetric: bool,
    zero: str,
    scale_dtype: str,
    lm_head: int,
) -> Plan:
    """Plan.uniform from command-line words, which Plan itself checks. Raises PlanError, CheckpointError."""
    from ...plan.plan import Plan

    words: dict[str, Any] = {"zero": zero, "scale_dtype": scale_dtype}
    return Plan.uniform(model, bits=bits, group_size=group_size, symmetric=symmetric, lm_head=lm_head, **words)


@app.command("uniform")
def uniform(
    model: ShapesOf,
    bits: BitsOption,
    group_size: GroupOption = 64,
    symmetric: SymmetricFlag = False,
    zero: ZeroOption = "int",
    scale_dtype: ScaleOption = "float16",
    lm_head: HeadOption = 16,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; stdout without it.")] = None,
) -> None:
    """Write a plan that gives every linear layer of MODEL one width."""
    from ...plan.resolve import resolve

    linears, _ = model_linears(model)
    plan = uniform_plan(linears, bits, group_size, symmetric, zero, scale_dtype, lm_head)
    resolve(plan, linears)  # refuses a group size that does not divide some K
    if output is None:
        print(plan.to_json(), end="")
        return
    plan.to_file(output)
    note(f"wrote {output}", quiet=False)


@app.command("check")
def check(plan_file: PlanFile, model: ShapesOf, as_json: JsonFlag = False) -> None:
    """Apply a plan to MODEL without reading weights: every packed weight, its widths and exact bytes."""
    resolved, _, _ = _resolve(plan_file, model)
    if as_json:
        print_json(resolved_dict(resolved))
    else:
        print_resolved(resolved)


@app.command("validate")
def validate(
    plan_file: PlanFile,
    model: Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="As for `plan check`.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say whether a plan is well formed and, with MODEL, whether it fits; exit code 1 and the reasons when not."""
    from ...plan.plan import Plan

    plan = Plan.from_file(plan_file)
    facts: dict[str, Any] = {"plan": str(plan_file), "model": None, "rules": len(plan.modules), "fuse": len(plan.fuse)}
    if model is not None:
        resolved, _, _ = _resolve(plan_file, model)
        facts |= {"model": str(model), "packed": len(resolved.weights), "kept": len(resolved.kept)}
    if as_json:
        print_json(facts)
    elif model is None:
        print(f"{plan_file}: well formed, {facts['rules']} rules; give MODEL to see whether it fits")
    else:
        print(f"{plan_file}: fits {model}: {facts['packed']} packed weights, {facts['kept']} linears kept")


@app.command("show")
def show(
    plan_file: PlanFile,
    model: ShapesOf,
    png: Annotated[Path | None, typer.Option(help="Also write the picture as a PNG file (needs matplotlib).")] = None,
    as_json: JsonFlag = False,
) -> None:
    """The widths as a picture: a row for each layer, a column for each projection; 16 is kept as it is."""
    from .picture import Picture, print_picture, write_png

    resolved, linears, _ = _resolve(plan_file, model)
    picture = Picture.of(resolved, linears)
    if png is not None:
        write_png(picture, png, f"{plan_file.name}: {resolved.size().bits_per_weight:.3f} bits per packed weight")
    if as_json:
        print_json(picture.to_dict())
    else:
        print_picture(picture)


@app.command("size")
def size(plan_file: PlanFile, model: ShapesOf, as_json: JsonFlag = False) -> None:
    """Bytes and bits per weight by purpose, exactly as they will be stored."""
    resolved, linears, itemsize = _resolve(plan_file, model)
    total, kept = resolved.size(), _kept_bytes(resolved, linears, itemsize)
    if as_json:
        print_json({"packed": size_dict(total), "kept_bytes": sum(kept.values()), "kept": kept})
        return
    parts = [(name, getattr(total, name)) for name in PURPOSES] + [("total", total.total_bits)]
    weights = max(total.weights, 1)
    rows = [[name, f"{bits / 8:,.0f}", round(bits / weights, 4)] for name, bits in parts]
    print_table(f"{total.weights:,} packed weights", ["<purpose", "bytes", "bits/weight"], rows)
    print(f"kept linears: {len(kept)}, {sum(kept.values()):,} bytes (a head tied to the embedding has none of its own)")


@app.command("diff")
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="Plan as JSON.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Plan as JSON.")],
    model: ShapesOf,
    as_json: JsonFlag = False,
) -> None:
    """The linears of MODEL that two plans treat differently, and the difference in bytes, B - A."""
    one, linears, itemsize = _resolve(first, model)
    other, _, _ = _resolve(second, model)
    plans = [_treatments(resolved) for resolved in (one, other)]
    kept = [_kept_bytes(resolved, linears, itemsize) for resolved in (one, other)]
    changes = []
    for spec in linears:
        a, b = (treatment.get(spec.name, KEPT) for treatment in plans)
        if a != b:
            sizes = [k.get(spec.name, t.get("bytes", 0)) for k, t in zip(kept, (a, b), strict=True)]
            keys = [key for key in b | a if a.get(key) != b.get(key) and key != "bytes"]
            changes.append({"name": spec.name, "a": a, "b": b, "changed": keys, "bytes": sizes[1] - sizes[0]})
    before, after = (r.size().total_bytes + sum(k.values()) for r, k in zip((one, other), kept, strict=True))
    if as_json:
        for change in changes:
            change |= {side: {k: v for k, v in change[side].items() if k != "perm"} for side in ("a", "b")}
        print_json({"changes": changes, "bytes_a": before, "bytes_b": after, "bytes": after - before})
        return
    rows = [[c["name"], _words(c["a"]), _words(c["b"]), f"{c['bytes']:+,}"] for c in changes]
    print_table(None, ["<module", "<A", "<B", "bytes"], rows)
    print(f"{len(changes)} of {len(linears)} linears differ; {before:,} -> {after:,} bytes ({after - before:+,})")


def model_linears(model: Path) -> tuple[list[LinearSpec], int]:
    """(linears of a dense directory or of a config.json alone, bytes of one of its weights when kept)."""
    if model.is_file():
        from ...evaluate.synthetic import config_dtype, config_linears
        from ...files.strict import read_json_object

        return config_linears(model), config_dtype(read_json_object(model)).itemsize
    from ...dense.checkpoint import DenseCheckpoint

    source = DenseCheckpoint.open(model)
    return source.linears(), source.dtype.itemsize


def _resolve(plan_file: Path, model: Path) -> tuple[ResolvedPlan, list[LinearSpec], int]:
    from ...plan.plan import Plan
    from ...plan.resolve import resolve

    plan = Plan.from_file(plan_file)
    linears, itemsize = model_linears(model)
    return resolve(plan, linears), linears, itemsize


def _kept_bytes(resolved: ResolvedPlan, linears: Sequence[LinearSpec], itemsize: int) -> dict[str, int]:
    """Kept linear -> bytes of its weight in the model's dtype; 0 for a head that is the embedding."""
    return {
        spec.name: 0 if spec.tied else spec.out_features * spec.in_features * itemsize
        for spec in linears
        if spec.name in resolved.kept
    }


def _treatments(resolved: ResolvedPlan) -> dict[str, dict[str, Any]]:
    """Packed linear -> what a plan does with it. Bytes leave out the permutation, which fused members share."""
    out: dict[str, dict[str, Any]] = {}
    for weight in resolved.weights:
        for member in weight.members:
            out[member.spec.name] = _treatment(member, weight.name if weight.fused else None)
    return out


def _treatment(member: ResolvedMember, fused: str | None) -> dict[str, Any]:
    layout = member.layout
    size = layout.size()
    return {
        "bits": widths(layout),
        "group": groups(layout),
        "zeros": kinds(layout),
        "scales": layout.scale_dtype,
        "cuts": [[s.n0, s.n1, s.k0, s.k1] for s in layout.segments],
        "permuted": member.perm is not None,
        "perm": member.perm,
        "fused": fused,
        "bytes": (size.total_bits - size.metadata) // 8,
    }


def _words(treatment: dict[str, Any]) -> str:
    if treatment is KEPT:
        return "kept"
    text = f"{treatment['bits']} bits, group {treatment['group']}, {treatment['zeros']}, {treatment['scales']}"
    text += f", {len(treatment['cuts'])} segments" if len(treatment["cuts"]) > 1 else ""
    text += ", permuted" if treatment["permuted"] else ""
    return text + (f", in {treatment['fused'].rpartition('.')[2]}" if treatment["fused"] else "")


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
