"""What a packing has finished, one line of JSON for each part, and on disk before it counts.

    {"journal": 1, "parts": 57, "identity": {...}}                     what is being packed, how and with what
    {"part": "packed model.layers.0.mlp.up_proj", "inputs": {"model.layers.0.mlp.up_proj.weight": sha256 of what was
     read}, "output": sha256 of what was written, "error": 0.0731}

The tensors of a part are on disk before its line is. A line that a crash cut off is dropped. While a run works on its
journal it holds a lock (flock) on it, which ends with the process however that ends: a journal that can be locked has
been left behind.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.strict import fsync_directory, parse_json, short, write_all

VERSION = 1
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # what file systems without them answer


@dataclass(frozen=True)
class Finished:
    """One part: sha256 of the bytes of each stored tensor that it was made of and of its output; its relative error."""

    part: str
    inputs: dict[str, str]
    output: str
    error: float | None = None


class Journal:
    """An open, locked journal. identity: as given to `create`, {} when not even that reached the disk.

    parts: how many there will be. finished: by name, as on disk when it was opened and as committed since.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        """`create` and `open` make one."""
        self.path, self._descriptor = path, descriptor
        self.identity: dict[str, Any] = {}
        self.parts = 0
        self.finished: dict[str, Finished] = {}
        self._pending: list[Finished] = []

    @classmethod
    def create(cls, path: Path, identity: dict[str, Any], parts: int) -> Journal:
        """A new journal, on disk and locked. Raises OSError, also when the path exists."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        journal = cls(path, os.open(path, flags, 0o666))
        try:
            _lock(journal._descriptor)
            journal.identity, journal.parts = identity, parts
            journal._append({"journal": VERSION, "parts": parts, "identity": identity})
            fsync_directory(path.parent)
        except BaseException:
            journal.close()
            path.unlink(missing_ok=True)
            raise
        return journal

    @classmethod
    def open(cls, path: Path) -> Journal | None:
        """A journal that was left behind; None when a run that is alive holds it, or has just finished with it.

        Raises CheckpointError: written by another version, or damaged; OSError.
        """
        try:
            journal = cls(path, os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        try:
            free = _lock(journal._descriptor)
            # Removed by its owner between the two calls above: the path may already be another run's.
            if free and os.fstat(journal._descriptor).st_nlink:
                journal._read()
                return journal
        except BaseException:
            journal.close()
            raise
        journal.close()
        return None

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        lines = [parse_json(line, f"{self.path}", allow_nonfinite=True) for line in data[:whole].splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise CheckpointError(f"{self.path}: is damaged: a line is no JSON object")
        if lines:
            version = lines[0].get("journal")
            if version != VERSION:
                raise CheckpointError(f"{self.path}: journal={version!r}, and this version writes {VERSION}")
            self.identity, self.parts = lines[0].get("identity", {}), lines[0].get("parts", 0)
            if not isinstance(self.identity, dict) or type(self.parts) is not int:
                raise CheckpointError(f"{self.path}: is damaged: its first line does not say what is packed")
        for line in lines[1:]:
            if not _is_finished(line):
                raise CheckpointError(f"{self.path}: is damaged: a line is no finished part ({short(line)})")
        self.finished = {line["part"]: Finished(**line) for line in lines[1:]}
        os.ftruncate(self._descriptor, whole)

    def add(self, finished: Finished) -> None:
        """Note a part whose tensors have been written; it counts from the next `commit`."""
        self._pending.append(finished)

    def commit(self) -> None:
        """Put what was added on disk, once the tensors are there. Raises OSError; then nothing new counts."""
        if self._pending:
            self._append(*(asdict(finished) for finished in self._pending))
            self.finished |= {finished.part: finished for finished in self._pending}
            self._pending.clear()

    def _append(self, *lines: dict[str, Any]) -> None:
        before = os.fstat(self._descriptor).st_size
        try:
            write_all(self._descriptor, "".join(json.dumps(line) + "\n" for line in lines).encode())
            os.fsync(self._descriptor)
        except BaseException:
            os.ftruncate(self._descriptor, before)  # or half a line would stand before the next one
            raise

    def close(self) -> None:
        """Let go of the lock; the journal stays."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Remove the journal from disk and close it."""
        self.path.unlink(missing_ok=True)
        self.close()


def _is_finished(line: dict[str, Any]) -> bool:
    """Whether a line has the fields of Finished, of their types."""
    if not {"part", "inputs", "output"} <= set(line) <= {each.name for each in fields(Finished)}:
        return False
    inputs = line["inputs"]
    texts = [line["part"], line["output"], *(inputs.values() if isinstance(inputs, dict) else [None])]
    return all(isinstance(text, str) for text in texts) and isinstance(line.get("error"), float | int | None)


def _lock(descriptor: int) -> bool:
    """Whether the lock could be had. Raises OSError where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise OSError(error.errno, f"{error.strerror}: its file system has no file locks (flock)") from error
        raise
    return True
