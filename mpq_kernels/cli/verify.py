"""`mpq verify`: hash a packed directory and read it whole, values included; compare it with the dense model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..progress import Progress
from .options import JsonFlag, PackedDir, QuietFlag
from .output import count, print_json, print_table, progress, widths

if TYPE_CHECKING:
    from ..checkpoint.packed import PackedCheckpoint
    from ..dense.checkpoint import DenseCheckpoint


def command(
    out: PackedDir,
    against: Annotated[Path | None, typer.Option(metavar="MODEL", help="Dense model that OUT was packed from.")] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Check hashes, names, dtypes, shapes, sizes and values of OUT; exit code 1 and one message at the first fault."""
    from ..checkpoint.manifest import changed_files
    from ..checkpoint.packed import PackedCheckpoint

    checkpoint = PackedCheckpoint.open(out)
    size = checkpoint.size()
    hashed = _hash(checkpoint, as_json or quiet)
    total = len(checkpoint.modules)
    with progress("checking", hidden=as_json or quiet) as report:
        for done, name in enumerate(checkpoint.verified(), start=1):
            if report is not None:
                report(done, total, name)
    layers = None if against is None else _compare(checkpoint, against, as_json or quiet)
    if as_json:
        counts = {"modules": total, "tensors": len(checkpoint.tensors), "files": len(checkpoint.files.files)}
        about = {"path": str(checkpoint.path), "ok": True, "hashed": hashed}
        print_json({**about, **counts, "file_bytes": size.files, "layers": layers})
        return
    if layers is not None:
        rows = [[layer["name"], layer["bits"], layer["relative_error"], layer["max_error"]] for layer in layers]
        columns = ["<module", "<bits", "error", "max error"]
        print_table(f"||W - packed W|| / ||W|| and max |W - packed W| against {against}", columns, rows)
    kept = "" if against is None else f", {count(len(checkpoint.kept_tensors()), 'kept tensor')} equal to {against}"
    tensors, files = count(len(checkpoint.tensors), "tensor"), count(len(checkpoint.files.files), "file")
    print(f"{checkpoint.path}: good. {count(total, 'packed module')}, {tensors} in {files}, {size.files:,} bytes{kept}")
    if hashed is None:
        print("not hashed: the directory has no mpq_manifest.json, which `mpq pack` writes")
    else:
        print(f"SHA-256 as in mpq_manifest.json: {', '.join(hashed)}")
        for name, how in changed_files(checkpoint.path).items():
            print(f"{how} since it was packed: {name}")


def _hash(checkpoint: PackedCheckpoint, hidden: bool) -> list[str] | None:
    """Names of the files whose SHA-256 is that of the manifest, None without one. Raises CheckpointError."""
    from ..checkpoint.manifest import read_manifest, verified_files
    from ..dense.checkpoint import CONFIG_FILE
    from ..files.shards import INDEX_FILE

    listed = read_manifest(checkpoint.path)
    if listed is None:
        return None
    used = {file.name for file in checkpoint.files.files} | {CONFIG_FILE}
    if len(checkpoint.files.files) > 1:
        used.add(INDEX_FILE)
    names = []
    with progress("hashing", hidden) as report:
        for name in verified_files(checkpoint.path, used):
            names.append(name)
            if report is not None:
                report(len(names), len(listed), name)
    return names


def _compare(checkpoint: PackedCheckpoint, against: Path, hidden: bool) -> list[dict[str, Any]]:
    """Relative error of every packed linear. Raises CheckpointError when `against` is another model."""
    from ..dense.checkpoint import DenseCheckpoint

    source = DenseCheckpoint.open(against)
    with progress("comparing", hidden) as report:
        layers = list(_layer_errors(checkpoint, source, report))
    _check_kept(checkpoint, source)
    return layers


def _layer_errors(
    checkpoint: PackedCheckpoint, source: DenseCheckpoint, report: Progress | None
) -> Iterator[dict[str, Any]]:
    from ..errors import CheckpointError
    from ..format.float8 import float8_error
    from ..format.reference import weight_error
    from ..format.words import unpack_weight

    specs = {spec.name: spec for spec in source.packable()}
    for done, (packed_name, module) in enumerate(checkpoint.modules.items(), start=1):
        packed = checkpoint.weight(packed_name)
        layout, rows = packed.layout, 0
        for name in module.replaced():
            spec = specs.get(name)
            end = rows + (spec.out_features if spec else 0)
            if spec is None or spec.in_features != layout.in_features or end > layout.out_features:
                raise CheckpointError(
                    f"{source.path}: has no linear or embedding {name} that fits the packed {packed_name} of "
                    f"{layout.out_features} x {layout.in_features}; "
                    f"{checkpoint.path} was packed from another model"
                )
            part = packed.rows(rows, end)
            error = weight_error(source.weight(spec), unpack_weight(part))
            source.release_weight(spec)
            about = {"name": name, "packed": packed_name, "bits": widths(part.layout)}
            yield about | {"relative_error": error.relative, "max_error": error.largest}
            rows = end
        checkpoint.release(packed_name)
        if report is not None:
            report(done, len(checkpoint.modules), packed_name)
    for name, float8 in checkpoint.packing.floats.items():
        spec = specs.get(name)
        if spec is None or (spec.out_features, spec.in_features) != (
            float8.shape.out_features,
            float8.shape.in_features,
        ):
            raise CheckpointError(
                f"{source.path}: has no linear {name} of the shape that {checkpoint.path} holds in fp8"
            )
        relative, largest = float8_error(
            source.weight(spec), *(checkpoint.read(f"{name}.{k}") for k in ("qweight", "scales"))
        )
        source.release(spec.tensor)
        yield {"name": name, "packed": name, "bits": "fp8", "relative_error": relative, "max_error": largest}


def _check_kept(checkpoint: PackedCheckpoint, source: DenseCheckpoint) -> None:
    """Raise CheckpointError unless every kept tensor has the source's dtype and bytes."""
    import torch

    from ..errors import CheckpointError

    origins = source.model_map.origins
    for name in checkpoint.kept_tensors():
        if name not in source.tensors and name not in origins:
            raise CheckpointError(f"{checkpoint.tensors[name]}: {source.path} has no such tensor; it is another model")
        stored = (name,) if name in source.tensors else origins[name].tensors
        kept, dense = checkpoint.read(name), source.read(name) if name in source.tensors else source.made(origins[name])
        same = kept.dtype == dense.dtype and kept.shape == dense.shape
        # As bytes: NaN would differ from itself.
        if not same or not torch.equal(kept.reshape(-1).view(torch.uint8), dense.reshape(-1).view(torch.uint8)):
            raise CheckpointError(f"{checkpoint.tensors[name]}: kept, but not equal to {source.tensors[stored[0]]}")
        checkpoint.files.release(name)
        for tensor in stored:
            source.release(tensor)
