"""`import_checkpoint`: a quantized checkpoint of another program becomes a packed one, weight by weight.

    headers, zeros, orders of columns -> layouts -> [read codes, pack, write] -> rename

What is written is exactly what is there: the dequantized weight is that of the format's own library (docs/importing.md
says in which dtype that computes). One weight is in memory at a time.
"""

from __future__ import annotations

import os

from ..errors import CheckpointError
from ..packer.output import check_output
from ..packer.pack import MAX_SHARD_BYTES, write_packed
from ..progress import Progress
from .formats import AUTO
from .job import ImportJob, prepare_import, taken
from .report import ImportReport
from .source import ForeignCheckpoint


def import_checkpoint(
    model_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    format: str = AUTO,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    resume: bool | None = None,
    fuse: bool = False,
) -> ImportReport:
    """Make the packed directory `out_dir` of a checkpoint that another program quantized, without quantizing again.

    format: a key of imports.formats.FORMATS; "auto" finds it out. overwrite, max_shard_bytes, progress, resume: as of
    `pack`. fuse: one packed weight for q, k and v, and for gate and up, where they agree in all layers.

    Raises CheckpointError, before any work is done for what cannot be had exactly.
    """
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes!r} must be a positive number of bytes")
    source = ForeignCheckpoint.open_as(model_dir, format)
    resolved, notes = prepare_import(source, fuse)
    if not resolved.weights:
        raise CheckpointError(f"{source.path}: no linear of the model is quantized")
    out = check_output(out_dir, source.path, overwrite, resume is True)
    job = ImportJob(source, resolved, progress)
    plan = repr(resolved.weights)
    packed = write_packed(job, out, plan, {"quantizer": job.quantizer}, max_shard_bytes, resume)
    return ImportReport(source.format, taken(source, resolved), (*source.notes, *notes), packed)
