"""`mpq inspect`: what a packed directory holds, recomputed from its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import JsonFlag, PackedDir
from .output import groups, kinds, print_json, print_table, size_dict, widths
from .plan.resolved import print_kept, with_users

if TYPE_CHECKING:
    from ..checkpoint.packed import PackedCheckpoint

PURPOSES = ("codes", "scales", "zeros", "metadata", "padding")


def command(out: PackedDir, as_json: JsonFlag = False) -> None:
    """Show every packed module: widths, groups, segments, bits per weight and bytes as stored; then the rest."""
    from ..checkpoint.packed import PackedCheckpoint

    checkpoint = PackedCheckpoint.open(out)
    data = describe(checkpoint)
    if as_json:
        print_json(data)
    else:
        _print(checkpoint, data)


def describe(checkpoint: PackedCheckpoint) -> dict[str, Any]:
    """Everything that `mpq inspect --json` prints."""
    size = checkpoint.size()
    modules = [
        {
            "name": name,
            "members": [[m.name, m.n0, m.n1] for m in module.members] if module.members else None,
            "experts": {"module": module.experts.module, "count": module.experts.count} if module.experts else None,
            "embedding": None if module.embedding is None else {"shared": list(module.shared)},
            "bias": module.bias,
            "layout": module.layout.to_dict(),
            "bytes": size_dict(module.layout.size()),
        }
        for name, module in checkpoint.modules.items()
    ]
    return {
        "path": str(checkpoint.path),
        "producer": checkpoint.packing.producer,
        "quantizer": checkpoint.packing.quantizer,
        "modules": modules,
        "float8": [
            {"name": name, "out_features": m.shape.out_features, "in_features": m.shape.in_features, "bias": m.bias}
            | {"bytes": size_dict(m.shape.size())}
            for name, m in checkpoint.packing.floats.items()
        ],
        "kept": checkpoint.packing.kept,
        "total": size_dict(size.packed) | {"bias": size.bias, "kept": size.kept, "files": size.files},
        "files": _files(checkpoint.path),
    }


def _files(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()}


def _print(checkpoint: PackedCheckpoint, data: dict[str, Any]) -> None:
    rows: list[list[object]] = []
    for name, module in checkpoint.modules.items():
        layout = module.layout
        size = size_dict(layout.size())
        row = [
            with_users(name, module.embedding),
            f"{layout.out_features} x {layout.in_features}",
            widths(layout),
            groups(layout),
            kinds(layout),
        ]
        rows.append([*row, len(layout.segments), round(size["bpw"], 4), *(size[p] for p in PURPOSES), size["total"]])
    for name, float8 in checkpoint.packing.floats.items():
        size = size_dict(float8.shape.size())
        row = [name, f"{float8.shape.out_features} x {float8.shape.in_features}", "fp8", "row", "none"]
        rows.append([*row, 1, round(size["bpw"], 4), *(size[p] for p in PURPOSES), size["total"]])
    total = data["total"]
    rows.append(["total", "", "", "", "", None, round(total["bpw"], 4), *(total[p] for p in PURPOSES), total["total"]])
    columns = ["<module", "<shape", "<bits", "<group", "<zeros", "segments", "bpw", *PURPOSES, "bytes"]
    producer = " ".join(data["producer"].values())
    print_table(f"{data['path']}  ({producer}, {data['quantizer']})", columns, rows)
    print_kept(data["kept"])
    print_table(None, ["<file", "bytes"], list(data["files"].items()))
    print(
        f"packed {total['total']:,} bytes at {total['bpw']:.4f} bits per weight, biases {total['bias']:,}, "
        f"kept tensors {total['kept']:,}, weight files {total['files']:,}"
    )
