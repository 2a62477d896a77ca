"""`mpq pack --dry-run`: every tensor and file that would be written, in exact bytes, with no weight read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import print_json, print_table, size_dict
from .plan.resolved import print_kept

if TYPE_CHECKING:
    from ..plan.plan import Plan


def dry_run(
    model: Path,
    out: Path,
    plan: Plan,
    quantizer: str,
    text: bool,
    *,
    act_order: bool,
    overwrite: bool,
    allow_dense: bool,
    as_json: bool,
) -> None:
    """Print what `pack` would write. text: whether there is one to calibrate on. Raises what `pack` would raise."""
    from ..dense.checkpoint import DenseCheckpoint
    from ..files.safetensors import file_bytes, nbytes
    from ..packer.job import PackJob, prepare
    from ..packer.output import check_output
    from ..packer.pack import MAX_SHARD_BYTES
    from ..packer.refuse import check_loads
    from ..quantize import QUANTIZERS

    source = DenseCheckpoint.open(model)
    calibrated = text or QUANTIZERS[quantizer].needs_calibration
    resolved = prepare(source, plan, quantizer, calibrated, act_order, allow_dense)
    check_output(out, source.path, overwrite)
    job = PackJob(source, resolved, quantizer, None)
    shards = job.shards(MAX_SHARD_BYTES)
    check_loads(source, job.packing(), {name: spec for shard in shards for name, spec in shard.specs.items()})
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
