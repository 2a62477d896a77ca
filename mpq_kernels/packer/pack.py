"""From a dense checkpoint and a plan to a packed checkpoint, one weight in memory at a time.

    headers of the source -> resolved plan -> exact sizes -> shards -> [read, quantize, pack, write] -> rename

All sizes are known before a weight is read, so every file's header is written first and each weight goes to its place
behind it. The same input gives the same bytes, in one run or in several: what is finished is on disk (journal.py,
unfinished.py). Nothing is visible under the output's name before all of it is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..calibrate import auto_round
from ..calibrate.calibration import Calibration
from ..calibrate.hessians import Calibrator
from ..checkpoint.manifest import MANIFEST_FILE, file_entry, manifest_bytes, manifest_text
from ..checkpoint.packed import PackedCheckpoint
from ..dense.checkpoint import CONFIG_FILE, DenseCheckpoint
from ..errors import CheckpointError, QuantizeError
from ..files.safetensors import file_bytes
from ..files.shards import INDEX_FILE
from ..files.strict import json_bytes, write_new_file
from ..format.codes import FORMAT_VERSION, LAYOUT_ID
from ..plan.plan import Plan
from ..progress import Progress
from ..quantize import find_quantizer
from ..version import VERSION
from .carry import carried_bytes, carry, folders_of
from .job import PackJob, prepare
from .output import check_output, check_space
from .parts import Shard, index_of
from .refuse import check_loads
from .report import PackReport
from .unfinished import ARRANGEMENT, TIME, working_directory
from .write import write_parts

MAX_SHARD_BYTES = 5_000_000_000  # a broken download or copy repeats no more than this


def pack(
    model_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    plan: Plan,
    quantizer: str = "hqq",
    calibration: Calibration | os.PathLike[str] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    resume: bool | None = None,
    allow_dense: bool = False,
) -> PackReport:
    """Quantize and pack the checkpoint in `model_dir` into the new directory `out_dir`.

    quantizer: a key of quantize.QUANTIZERS. calibration: for quantizers that take it, a Calibration or the path (a
    pathlib.Path) of a UTF-8 text, of the kind that the model is used for and not what it is tested on. What is then
    held in memory besides one weight: calibrate/hessians.py, calibrate/auto_round.py. overwrite: replace an older
    packed checkpoint, once the new one is complete. max_shard_bytes: tensor bytes of one file; a larger weight gets a
    file of its own.
    progress: called as progress(done, total, name) with bytes of the source. resume: whether to go on with what a run
    that was killed has finished for this output: True goes on (from the beginning where there is nothing; under another
    plan, with what that leaves as it was), False removes it and starts over, None raises CheckpointError when there is
    any. allow_dense: pack a model of which less
    than half would be packed because its linears are not known as such (dense/kinds.py).

    Raises CheckpointError (files, disk, a model like that), PlanError (the plan does not fit the model), QuantizeError
    (NaN in a weight, scale out of range). `out_dir` is then as it was before.
    """
    calibrated = _check_calibration(quantizer, calibration)
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes!r} must be a positive number of bytes")
    source = DenseCheckpoint.open(model_dir)
    act_order = calibrated is not None and calibrated.act_order
    sample = calibrated.samples[0] if calibrated is not None and calibrated.samples else None
    resolved = prepare(source, plan, quantizer, calibrated is not None, act_order, allow_dense, sample)
    out = check_output(out_dir, source.path, overwrite, resume is True)
    calibrator: Calibrator | auto_round.LearnedRounding | None = None
    if calibrated is not None and resolved.weights:
        if find_quantizer(quantizer).whole_model:
            calibrator = auto_round.LearnedRounding(source, resolved, calibrated, quiet=progress is None)
        else:
            calibrator = Calibrator(source, calibrated)
    job = PackJob(source, resolved, quantizer, progress, calibrator)
    options = {"quantizer": quantizer, "calibration": None if calibrated is None else calibrated.identity()}
    return write_packed(job, out, plan.to_json(), options, max_shard_bytes, resume)


def write_packed(
    job: PackJob, out: Path, plan: str, options: dict[str, Any], max_shard_bytes: int, resume: bool | None
) -> PackReport:
    """Write all that a job makes into the directory `out`, which check_output gave, and carry files along.

    plan: text of what the job makes of which tensor; a run that is resumed may have another one. options: what else the
    bytes depend on; it must have the same. Raises as `pack` does.
    """
    source = job.source
    shards = job.shards(max_shard_bytes)
    unused = check_loads(source, job.packing(), {name: spec for shard in shards for name, spec in shard.specs.items()})
    texts = {CONFIG_FILE: json_bytes(job.config())}
    if len(shards) > 1:
        texts = {INDEX_FILE: json_bytes(index_of(shards))} | texts
    carried = job.carried()
    identity = _identity(source, plan, options, max_shard_bytes)
    with working_directory(out, identity, shards, resume) as work:
        _check_room(work.directory, shards, texts, carried_bytes(source.path, carried))
        write_parts(source, shards, work)
        carry(source.path, carried, work.directory)
        _finish(work.directory, shards, texts, carried)
        written = PackedCheckpoint.open(work.directory)
        report = job.report(out, written, carried, unused, len(work.finished))
    return report


def _identity(source: DenseCheckpoint, plan: str, options: dict[str, Any], max_shard_bytes: int) -> dict[str, Any]:
    """All that the bytes of the output depend on, but for the values of the tensors: what a resumed run must share.

    Under ARRANGEMENT: what it need not share, because parts have keys of their own.
    """
    try:
        files = {file.name: file.stat() for file in source.files.files}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}); was it removed?") from error
    return {
        "mpq_kernels": VERSION,
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),  # sums of other vectors are rounded in another order
        "format_version": FORMAT_VERSION,
        "layout_id": LAYOUT_ID,
        **options,
        ARRANGEMENT: {
            "max_shard_bytes": max_shard_bytes,
            "plan sha256": hashlib.sha256(plan.encode()).hexdigest(),
        },
        "config sha256": hashlib.sha256(json_bytes(source.config)).hexdigest(),
        "source": {name: {"bytes": status.st_size, TIME: status.st_mtime_ns} for name, status in files.items()},
    }


def _check_room(
    directory: Path, shards: Sequence[Shard], texts: Mapping[str, bytes], carried: Mapping[str, int]
) -> None:
    """Raise CheckpointError unless what is still to be written fits the disk. carried: name -> bytes."""
    sizes = {shard.name: file_bytes(shard.specs) for shard in shards}
    listed = sizes | {name: len(text) for name, text in texts.items()}
    size = sum(listed.values()) + manifest_bytes(listed, carried) + sum(carried.values())
    held = sum(512 * path.stat().st_blocks for path in directory.rglob("*"))
    check_space(directory, size - held, len(listed) + 1 + len(carried) + len(folders_of(carried)))


def _finish(directory: Path, shards: Sequence[Shard], texts: Mapping[str, bytes], carried: Sequence[str]) -> None:
    """The other files: the index, the manifest, config.json last. carried: names of files that are in place."""
    listed = {shard.name: file_entry(directory / shard.name) for shard in shards}
    for name, text in texts.items():
        listed[name] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    manifest = manifest_text(listed, {name: file_entry(directory / name) for name in carried})
    for name, text in ({MANIFEST_FILE: manifest} | dict(texts)).items():  # without config.json it is no model
        write_new_file(directory / name, text)


def _check_calibration(name: str, calibration: Calibration | os.PathLike[str] | None) -> Calibration | None:
    """What a quantizer is calibrated on. Raises QuantizeError where it is missing, of no use, or unreadable."""
    row = find_quantizer(name)
    if calibration is None and not row.needs_calibration:
        return None
    if not row.takes_calibration:
        raise QuantizeError(f"quantizer={name!r} uses no calibration data; leave calibration out")
    if isinstance(calibration, Calibration):
        return calibration
    if isinstance(calibration, os.PathLike):
        return Calibration.from_file(calibration)
    what = "is missing" if calibration is None else f"is a {type(calibration).__name__}"
    raise QuantizeError(
        f"quantizer={name!r} needs calibration, and it {what}: give a pathlib.Path of a UTF-8 text, or a Calibration"
    )
