"""What a packing has finished, one line of JSON for each part, and on disk before it counts.

    {"journal": 2, "ending": "", "parts": 57, "identity": {...}}       what is being packed, how, with what, and where
    {"part": "packed model.layers.0.mlp.up_proj", "key": sha256 of what the plan asks of it, "inputs":
     {"model.layers.0.mlp.up_proj.weight": sha256 of what was read}, "places": {"model.layers.0.mlp.up_proj.qweight":
     [0, 5120], ...}, "output": sha256 of what was written, "error": 0.0731, "zero_groups": 0}

The tensors of a part are on disk before its line is. A line that a crash cut off is dropped. While a run works on its
journal it holds a lock (flock) on it, which ends with the process however that ends: a journal that can be locked has
been left behind.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.strict import fsync_directory, parse_json, short, write_all

VERSION = 2
OTHER = ".other"
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # what file systems without them answer


@dataclass(frozen=True)
class Finished:
    """One part: its key and places (parts.py), and sha256 of each stored tensor that it was made of and of its output.

    error: its relative error. zero_groups: how many of its groups are stored as zeros, with a scale of 0.
    """

    part: str
    key: str
    inputs: dict[str, str]
    places: Mapping[str, Sequence[int]]
    output: str
    error: float | None = None
    zero_groups: int = 0


class Journal:
    """An open, locked journal. identity: as given to `create`, {} when not even that reached the disk.

    ending: "" or OTHER, behind the name of the directory where the parts are. parts: how many there will be. finished:
    by name, as on disk when it was opened and as committed since.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        """`create` and `open` make one."""
        self.path, self._descriptor = path, descriptor
        self.identity: dict[str, Any] = {}
        self.ending = ""
        self.parts = 0
        self.finished: dict[str, Finished] = {}
        self._pending: list[Finished] = []

    @classmethod
    def create(cls, path: Path, identity: dict[str, Any], parts: int, ending: str = "") -> Journal:
        """A new journal, on disk and locked. Raises OSError, also when the path exists."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        journal = cls(path, os.open(path, flags, 0o666))
        try:
            _lock(journal._descriptor)
            journal.identity, journal.parts, journal.ending = identity, parts, ending
            journal._append({"journal": VERSION, "ending": ending, "parts": parts, "identity": identity})
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
            first = {"identity": {}, "parts": 0, "ending": ""} | lines[0]
            self.identity, self.parts, self.ending = (first[key] for key in ("identity", "parts", "ending"))
            if not isinstance(self.identity, dict) or type(self.parts) is not int:
                raise CheckpointError(f"{self.path}: is damaged: its first line does not say what is packed")
            if self.ending not in ("", OTHER):
                raise CheckpointError(f"{self.path}: is damaged: its directory ends with {short(self.ending)}")
        for line in lines[1:]:
            if not _is_finished(line):
                raise CheckpointError(f"{self.path}: is damaged: a line is no finished part ({short(line)})")
        self.finished = {line["part"]: Finished(**line) for line in lines[1:]}
        os.ftruncate(self._descriptor, whole)

    @property
    def directory(self) -> Path:
        """Where the parts are: beside the journal."""
        return self.path.with_name(self.path.stem + self.ending)

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

    def take_place_of(self, other: Journal) -> None:
        """Replace a journal on disk by this one, in one step; the other is closed. Raises OSError."""
        os.rename(self.path, other.path)
        self.path = other.path
        fsync_directory(self.path.parent)
        other.close()

    def close(self) -> None:
        """Let go of the lock; the journal stays. Once more does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def remove(self) -> None:
        """Remove the journal from disk and close it."""
        self.path.unlink(missing_ok=True)
        self.close()


def _is_finished(line: dict[str, Any]) -> bool:
    """Whether a line has the fields of Finished, of their types."""
    if not {"part", "key", "inputs", "places", "output"} <= set(line) <= {each.name for each in fields(Finished)}:
        return False
    inputs, places, zero_groups = line["inputs"], line["places"], line.get("zero_groups", 0)
    texts = [line["part"], line["key"], line["output"], *(inputs.values() if isinstance(inputs, dict) else [None])]
    placed = isinstance(places, dict) and all(_is_place(place) for place in places.values())
    told = isinstance(line.get("error"), float | int | None) and type(zero_groups) is int
    return placed and told and all(isinstance(text, str) for text in texts)


def _is_place(place: Any) -> bool:
    """Whether it is [first element, count]."""
    return isinstance(place, list) and len(place) == 2 and all(type(each) is int and each >= 0 for each in place)


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
