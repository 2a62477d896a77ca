"""`mpq plan size`: what a plan takes on disk, by purpose."""

from __future__ import annotations

from ..options import JsonFlag, PlanFile, ShapesOf
from ..output import print_json, print_table, size_dict
from .resolved import kept_bytes, resolve_file

PURPOSES = ("codes", "scales", "zeros", "metadata", "padding")


def command(plan: PlanFile, model: ShapesOf, as_json: JsonFlag = False) -> None:
    """Bytes and bits per weight by purpose, exactly as they will be stored."""
    resolved, linears, itemsize = resolve_file(plan, model)
    total, kept = resolved.size(), kept_bytes(resolved, linears, itemsize)
    if as_json:
        print_json({"packed": size_dict(total), "kept_bytes": sum(kept.values()), "kept": kept})
        return
    parts = [(name, getattr(total, name)) for name in PURPOSES] + [("total", total.total_bits)]
    weights = max(total.weights, 1)
    rows = [[name, f"{bits / 8:,.0f}", round(bits / weights, 4)] for name, bits in parts]
    print_table(f"{total.weights:,} packed weights", ["<purpose", "bytes", "bits/weight"], rows)
    print(f"kept linears: {len(kept)}, {sum(kept.values()):,} bytes (a head tied to the embedding has none of its own)")
