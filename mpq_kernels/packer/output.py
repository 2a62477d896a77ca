"""The output directory: what may be made or replaced, room for it, and the swap of a finished one into its place.

    .<name>.replaced-<pid>    where an older <name> waits until the new one is in place

Nothing but packed checkpoints and what killed runs left behind is ever deleted.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..checkpoint.config import QUANT_METHOD
from ..dense.checkpoint import CONFIG_FILE
from ..errors import CheckpointError
from ..files.strict import fsync_directory, read_json_object

BLOCK_BYTES = 4096  # a file takes whole blocks; counted for each one that is written


def check_output(out_dir: str | os.PathLike[str], model_dir: Path, overwrite: bool, resume: bool = False) -> Path:
    """Absolute path of the directory to make. Raises CheckpointError when it may not be made or replaced.

    An existing directory must be empty, or a packed checkpoint and `overwrite` true: nothing else is ever deleted.
    """
    given = Path(out_dir)
    if given.is_symlink():
        raise CheckpointError(f"{given}: is a symbolic link; give the directory itself")
    out, model = given.resolve(), model_dir.resolve()
    if out.is_relative_to(model) or model.is_relative_to(out):
        raise CheckpointError(f"{out}: overlaps the model directory {model}; choose a directory beside it")
    if not out.parent.is_dir():
        raise CheckpointError(f"{out.parent}: there is no such directory; make it first (mkdir -p)")
    if not out.exists():
        return out
    if not out.is_dir():
        raise CheckpointError(f"{out}: is a file; choose another name or remove it")
    if any(out.iterdir()):
        if not overwrite:
            finished = " (a run that is to be resumed may have come to its end)" if resume else ""
            raise CheckpointError(
                f"{out}: is not empty{finished}; choose another, or replace it with overwrite=True (--overwrite)"
            )
        _check_ours(out)
    return out


def _check_ours(out: Path) -> None:
    cause = f"{CONFIG_FILE} does not say quant_method {QUANT_METHOD!r}"
    try:
        quantization = read_json_object(out / CONFIG_FILE).get("quantization_config")
    except CheckpointError as error:
        quantization, cause = None, str(error)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{out}: overwrite=True (--overwrite) replaces packed checkpoints only, and this is none ({cause}); "
            "remove it yourself"
        )


def check_space(parent: Path, needed: int, files: int) -> None:
    """Raise CheckpointError unless `needed` bytes in `files` files fit the file system that holds `parent`."""
    needed += files * BLOCK_BYTES
    try:
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise CheckpointError(f"{parent}: free space is unknown ({error.strerror or error})") from error
    if free < needed:
        raise CheckpointError(
            f"{parent}: {needed} bytes are needed and {free} are free, {needed - free} too few; free some space or "
            "choose another disk (an older output is only removed once the new one is complete)"
        )


def swap(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`, in place of an older one; on an error both are as they were. Raises OSError."""
    replaced = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    had_old = out.exists()
    if had_old:
        os.rename(out, replaced)
    try:
        os.rename(partial, out)
        fsync_directory(out.parent)
    except BaseException:
        if not partial.exists():
            os.rename(out, partial)
        if had_old:
            os.rename(replaced, out)
        raise
    if had_old:
        shutil.rmtree(replaced, ignore_errors=True)  # the new one is in place; a rest is removed by the next run


def bring_back(out: Path) -> None:
    """Undo what runs that were killed inside `swap` left: an older output returns, or is removed behind a newer one."""
    lead = f".{out.name}.replaced-"
    for name in os.listdir(out.parent):
        pid = name.removeprefix(lead)
        if not name.startswith(lead) or not pid.isdecimal() or alive(int(pid)):
            continue
        if out.exists():
            shutil.rmtree(out.parent / name)
        else:
            os.rename(out.parent / name, out)


def alive(pid: int) -> bool:
    """Whether another process has this id."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
