"""A plan applied to the linears of a model, without a weight read, and how that is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..output import groups, kinds, print_table, size_dict, widths

if TYPE_CHECKING:
    from ...dense.checkpoint import LinearSpec
    from ...format.layout import Embedding
    from ...plan.resolve import ResolvedPlan


def resolve_file(plan_file: Path, model: Path) -> tuple[ResolvedPlan, list[LinearSpec], int]:
    """(the plan on the model's linears, these, bytes of a kept weight). Raises PlanError, CheckpointError."""
    from ...plan.plan import Plan
    from ...plan.resolve import resolve

    plan = Plan.from_file(plan_file)
    linears, itemsize = model_linears(model)
    return resolve(plan, linears), linears, itemsize


def model_linears(model: Path) -> tuple[list[LinearSpec], int]:
    """(all that a plan may name of a dense directory or of a config.json alone, bytes of a weight when kept)."""
    if model.is_file():
        from ...evaluate.synthetic import config_dtype, config_packable
        from ...files.strict import read_json_object

        return config_packable(model), config_dtype(read_json_object(model)).itemsize
    from ...dense.checkpoint import DenseCheckpoint

    source = DenseCheckpoint.open(model)
    return source.packable(), source.dtype.itemsize


def kept_bytes(resolved: ResolvedPlan, linears: Sequence[LinearSpec], itemsize: int) -> dict[str, int]:
    """Kept linear -> bytes of its weight in the model's dtype; 0 for a head that is the embedding."""
    return {
        spec.name: 0 if spec.tied else spec.out_features * spec.in_features * itemsize
        for spec in linears
        if spec.name in resolved.kept
    }


def resolved_dict(resolved: ResolvedPlan) -> dict[str, Any]:
    """What a plan makes of a model, in JSON: packed weights with layout and bytes, kept linears, totals."""
    from ...format.float8 import Float8Shape

    modules = [
        {
            "name": weight.name,
            "members": [member.spec.name for member in weight.members],
            "embedding": None if weight.embedding is None else {"shared": list(weight.embedding.shared)},
            "layout": weight.layout.to_dict(),
            "bytes": size_dict(weight.layout.size()),
        }
        for weight in resolved.weights
    ]
    floats = [
        {"name": name, "out_features": s.out_features, "in_features": s.in_features}
        | {"bytes": size_dict(Float8Shape(s.out_features, s.in_features).size())}
        for name, s in resolved.floats.items()
    ]
    return {"modules": modules, "float8": floats, "kept": resolved.kept, "total": size_dict(resolved.size())}


def print_resolved(resolved: ResolvedPlan) -> None:
    """The same as a table."""
    from ...format.float8 import Float8Shape

    rows: list[list[object]] = []
    for weight in resolved.weights:
        layout = weight.layout
        shape = f"{layout.out_features} x {layout.in_features}"
        size = layout.size()
        row = [with_users(weight.name, weight.embedding), shape, widths(layout), groups(layout), kinds(layout)]
        rows.append([*row, round(size.bits_per_weight, 4), size.total_bytes])
    for name, spec in resolved.floats.items():
        size = Float8Shape(spec.out_features, spec.in_features).size()
        shape = f"{spec.out_features} x {spec.in_features}"
        rows.append([name, shape, "fp8", "row", "none", round(size.bits_per_weight, 4), size.total_bytes])
    total = resolved.size()
    rows.append(["total", "", "", "", "", round(total.bits_per_weight, 4), total.total_bytes])
    print_table(None, ["<module", "<shape", "<bits", "<group", "<zeros", "bpw", "bytes"], rows)
    print_kept(resolved.kept)


def with_users(name: str, embedding: Embedding | None) -> str:
    """Name of a packed weight in a table; behind that of an embedding, those of the modules that share it."""
    return name if embedding is None else " = ".join((name, *embedding.shared))


def print_kept(kept: dict[str, str]) -> None:
    """Kept linears with their reasons."""
    if kept:
        print_table(None, ["<kept", "<reason"], list(kept.items()))
