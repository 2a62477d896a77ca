"""`mpq plan diff`: the linears that two plans treat differently."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import JsonFlag, ShapesOf
from ..output import groups, kinds, print_json, print_table, widths
from .resolved import kept_bytes, resolve_file

if TYPE_CHECKING:
    from ...plan.resolve import ResolvedMember, ResolvedPlan

KEPT: dict[str, Any] = {"bits": "16"}  # a linear that no plan packs


def command(
    first: Annotated[Path, typer.Argument(metavar="A", help="Plan as JSON.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Plan as JSON.")],
    model: ShapesOf,
    as_json: JsonFlag = False,
) -> None:
    """The linears of MODEL that two plans treat differently, and the difference in bytes, B - A."""
    one, linears, itemsize = resolve_file(first, model)
    other, _, _ = resolve_file(second, model)
    plans = [_treatments(resolved) for resolved in (one, other)]
    # Embeddings count where one of the plans packs them.
    linears = [spec for spec in linears if not spec.embedding or any(spec.name in plan for plan in plans)]
    kept = [
        kept_bytes(resolved, linears, itemsize)
        | {s.name: s.out_features * s.in_features * itemsize for s in linears if s.embedding and s.name not in plan}
        for resolved, plan in zip((one, other), plans, strict=True)
    ]
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


def _treatments(resolved: ResolvedPlan) -> dict[str, dict[str, Any]]:
    """Packed linear or embedding -> what a plan does with it. Bytes leave out a permutation, which members share."""
    from ...format.float8 import Float8Shape

    out: dict[str, dict[str, Any]] = {}
    for weight in resolved.weights:
        for member in weight.members:
            out[member.spec.name] = _treatment(member, weight.name if weight.fused else None)
        if weight.embedding is not None:  # a tied head takes no bytes of its own
            out |= dict.fromkeys(weight.embedding.shared, out[weight.name] | {"bytes": 0})
    for name, spec in resolved.floats.items():
        whole = [[0, spec.out_features, 0, spec.in_features]]
        size = Float8Shape(spec.out_features, spec.in_features).size()
        out[name] = {"bits": "fp8", "group": "row", "zeros": "none", "scales": "float32", "cuts": whole}
        out[name] |= {"permuted": False, "perm": None, "fused": None, "bytes": size.total_bytes}
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
