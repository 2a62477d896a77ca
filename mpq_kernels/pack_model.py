"""From a dense checkpoint and a plan to a packed checkpoint, one weight in memory at a time.

    headers of the source -> resolved plan -> exact sizes -> shards -> [read, quantize, pack, write] -> rename

All sizes are known before a weight is read, so every file's header is written first and its tensors stream behind it.
The same input gives the same bytes. Nothing is visible under the output's name before all of it is on disk.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from . import autoround
from .calibrate import Calibration, Calibrator
from .checkpoint import PackedCheckpoint
from .errors import CheckpointError, QuantizeError
from .files import create_file, write_new_file
from .formats import KEPT_BITS
from .outdir import check_output, check_space, json_bytes, new_directory
from .pack_job import PackJob, Progress, in_free_order, index_of
from .plan import EXPERTS, Plan
from .quantize import quantizer as quantizer_row
from .report import PackReport
from .resolve import ResolvedPlan, resolve
from .safetensors_io import file_bytes, write_safetensors
from .shards import INDEX_FILE
from .source import CONFIG_FILE, SourceCheckpoint

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
) -> PackReport:
    """Quantize and pack the checkpoint in `model_dir` into the new directory `out_dir`.

    quantizer: a key of quantize.QUANTIZERS. calibration: for quantizers that need it, a Calibration or the path (a
    pathlib.Path) of a UTF-8 text, of the kind that the model is used for and not what it is tested on. The dense model
    is then held in memory (calibrate.py). overwrite: replace an older packed checkpoint, once the new one is complete.
    max_shard_bytes: tensor bytes of one file; a larger weight gets a file of its own. progress: called as
    progress(done, total, name) with bytes of the source.

    Raises CheckpointError (files, disk), PlanError (the plan does not fit the model), QuantizeError (NaN in a weight,
    scale out of range). `out_dir` is then as it was before.
    """
    calibrated = _check_calibration(quantizer, calibration)
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes!r} must be a positive number of bytes")
    source = SourceCheckpoint.open(model_dir)
    resolved = resolve(plan, source.linears())
    check_calibratable(resolved, quantizer)
    if calibrated is not None and calibrated.act_order:
        resolved = in_free_order(resolved)
    out = check_output(out_dir, source.path, overwrite)
    calibrator: Calibrator | autoround.LearnedRounding | None = None
    if calibrated is not None and resolved.weights:
        if quantizer_row(quantizer).whole_model:
            calibrator = autoround.LearnedRounding(source, resolved, calibrated, quiet=progress is None)
        else:
            calibrator = Calibrator(source, calibrated)
    job = PackJob(source, resolved, quantizer, progress, calibrator)
    shards = job.shards(max_shard_bytes)
    texts = {CONFIG_FILE: json_bytes(job.config())}
    if len(shards) > 1:
        texts = {INDEX_FILE: json_bytes(index_of(shards))} | texts
    companions = source.other_files()
    size = sum(file_bytes(shard.specs) for shard in shards) + sum(map(len, texts.values()))
    size += sum(path.stat().st_size for path in companions)
    check_space(out.parent, size, len(shards) + len(texts) + len(companions))
    with new_directory(out) as partial:
        for shard in shards:
            write_safetensors(partial / shard.name, shard.specs, shard.tensors())
        for path in companions:
            _copy(path, partial / path.name)
        for name, text in texts.items():  # the index, then config.json: without it nothing takes this for a model
            write_new_file(partial / name, text)
        written = PackedCheckpoint.open(partial)
        report = job.report(out, written, companions)
    return report


def check_calibratable(resolved: ResolvedPlan, quantizer: str) -> None:
    """Raise QuantizeError when a calibrated quantizer cannot do what the plan asks: widths of experts, and others."""
    experts = [member.spec.name for weight in resolved.weights for member in weight.members if member.spec.expert]
    if experts and quantizer_row(quantizer).needs_calibration:
        raise QuantizeError(
            f"quantizer={quantizer!r} reads the inputs of nn.Linear modules, and the plan gives widths to "
            f"{len(experts)} linears of experts ({experts[0]}, ...), which are none: choose 'hqq' or 'rtn', or keep "
            f'the experts with the rule {{"{EXPERTS}": {{"bits": {KEPT_BITS}}}}} after all other regexes'
        )
    if quantizer_row(quantizer).whole_model:
        autoround.check_plan(resolved)


def _check_calibration(name: str, calibration: Calibration | os.PathLike[str] | None) -> Calibration | None:
    """The calibration that a quantizer asks for. Raises QuantizeError where it is missing, of no use, or unreadable."""
    if not quantizer_row(name).needs_calibration:
        if calibration is not None:
            raise QuantizeError(f"quantizer={name!r} uses no calibration data; leave calibration out")
        return None
    if isinstance(calibration, Calibration):
        return calibration
    if isinstance(calibration, os.PathLike):
        return Calibration.from_file(calibration)
    what = "is missing" if calibration is None else f"is a {type(calibration).__name__}"
    raise QuantizeError(
        f"quantizer={name!r} needs calibration, and it {what}: give a pathlib.Path of a UTF-8 text, or a Calibration"
    )


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as file, create_file(target) as descriptor, os.fdopen(os.dup(descriptor), "wb") as out:
        shutil.copyfileobj(file, out)
