"""The directory that a packing writes into, and what becomes of it when the run is killed, fails, or is resumed.

    .<name>.partial-<pid>           the output in the making; renamed to <name> when all of it is on disk
    .<name>.partial-<pid>.other     the same, once what was finished has been arranged under another plan
    .<name>.partial-<pid>.journal   what in it is finished, and which of the two it is (journal.py); locked while a run
                                    works on it

A run that ends early leaves both when parts are finished, and nothing otherwise. The next one for the same output goes
on with them, removes them, or refuses to choose, as it is told to. Under another plan it goes on with the parts that
the plan leaves as they were: they are copied to their new places (arrange.py), then the new journal takes the place of
the old one, and only then the old files go.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.strict import fsync_directory
from .arrange import arrange
from .journal import OTHER, Finished, Journal
from .output import alive, bring_back, swap
from .parts import Shard

GO_ON = "resume=True (--resume) goes on with it, resume=False (--restart) removes it and starts over"
TIME = "modified"  # key of a source file's time in an identity: ["source"][file name][TIME]
ARRANGEMENT = "arrangement"  # key of what another run may have changed


@dataclass(frozen=True, eq=False)
class Work:
    """A directory in the making and its journal.

    finished: the parts by name that were finished when this run began. touched: source files that have been written to
    since, by their time; what finished parts read of them must be compared.
    """

    directory: Path
    journal: Journal
    finished: dict[str, Finished] = field(default_factory=dict)
    touched: frozenset[str] = frozenset()


@contextmanager
def working_directory(
    out: Path, identity: dict[str, Any], shards: Sequence[Shard], resume: bool | None
) -> Iterator[Work]:
    """Yields where to write; the directory becomes `out` when the block ends well.

    identity: all that the bytes of the output depend on, but for the tensors' values; shards: what will be written.
    resume: True goes on with what a killed run left, if any; False removes it; None refuses to run when there is any.
    When the block fails, finished parts are kept and the exception has a note that says so; an existing `out` is as it
    was. OSError becomes CheckpointError.
    """
    try:
        bring_back(out)
        work = _take_up(out, identity, shards, resume) or _begin(out, identity, shards)
        try:
            yield work
            fsync_directory(work.directory)
            swap(work.directory, out)
        except BaseException as error:
            _leave(work, error)
            raise
        with suppress(OSError):  # the output is in place; the next run removes a journal without a directory
            work.journal.remove()
    except OSError as error:
        failed = CheckpointError(f"{error.filename or out}: cannot write {out} ({error.strerror or error})")
        for note in getattr(error, "__notes__", ()):
            failed.add_note(note)
        raise failed from error


def _begin(out: Path, identity: dict[str, Any], shards: Sequence[Shard]) -> Work:
    directory = out.with_name(f".{out.name}.partial-{os.getpid()}")
    if directory.exists():
        raise CheckpointError(f"{directory}: this process is already packing into {out}")
    path = directory.with_name(f"{directory.name}.journal")
    journal = Journal.create(path, identity, _count(shards))
    try:
        directory.mkdir()
    except BaseException:
        journal.remove()
        raise
    return Work(directory, journal)


def _count(shards: Sequence[Shard]) -> int:
    return sum(len(shard.parts) for shard in shards)


def _leave(work: Work, error: BaseException) -> None:
    """Keep finished work, or remove the directory and the journal where there is none."""
    journal = work.journal
    if not journal.finished:
        shutil.rmtree(work.directory, ignore_errors=True)
        with suppress(OSError):  # the error on its way up matters more; the next run cleans up
            journal.remove()
        return
    journal.close()
    error.add_note(f"{_describe(work.directory, journal)} kept: {GO_ON}, also under another plan")


def _describe(directory: Path, journal: Journal) -> str:
    return f"{directory}: {len(journal.finished)} of {journal.parts} parts are finished and"


def _take_up(out: Path, identity: dict[str, Any], shards: Sequence[Shard], resume: bool | None) -> Work | None:
    """What a killed run left, when this one is to go on with it. Raises CheckpointError when it does not fit."""
    left = list(_left_behind(out, resume))
    try:
        if resume is False:
            while left:
                _remove(*left.pop())
        if not left:
            return None
        directory, journal = left[0]
        if len(left) > 1:
            names = ", ".join(str(each) for each, _ in left)
            raise CheckpointError(f"{out}: several runs were killed ({names}); remove all but the one to go on with")
        differences = list(_differences(journal.identity, identity))
        touched = frozenset(keys[1] for keys, _, _ in differences if keys[:1] == ("source",) and keys[2:] == (TIME,))
        arranged = [keys for keys, _, _ in differences if keys[0] == ARRANGEMENT]
        other = [
            f"{'.'.join(keys)} was {then}, is {now}"
            for keys, then, now in differences
            if keys[2:] != (TIME,) and keys not in arranged
        ]
        if other:
            raise CheckpointError(
                f"{_describe(directory, journal)} kept, but of another packing: {'; '.join(other)}. "
                "Run it with what it was begun with, or with resume=False (--restart) to remove it"
            )
        if resume is None:
            raise CheckpointError(f"{_describe(directory, journal)} kept by a run that was killed: {GO_ON}")
        parts = {part.name: part.key for shard in shards for part in shard.parts}
        finished = {name: done for name, done in journal.finished.items() if parts.get(name) == done.key}
        left.clear()
        if arranged:
            identity = identity | {"source": journal.identity["source"]}  # their times are those of the first run
            directory, journal = _arranged(directory, journal, identity, shards, finished)
        return Work(directory, journal, finished, touched)
    finally:
        for _, journal in left:
            journal.close()


def _arranged(
    directory: Path,
    journal: Journal,
    identity: dict[str, Any],
    shards: Sequence[Shard],
    finished: dict[str, Finished],
) -> tuple[Path, Journal]:
    """What is still valid under another plan, in a directory of its own with a new journal, in place of what was left.

    Whatever ends this before its end leaves the old ones as they are.
    """
    ending = "" if journal.ending else OTHER
    new = directory.with_name(journal.path.stem + ending)
    path = journal.path.with_name(f"{journal.path.name}{OTHER}")
    arranged = Journal.create(path, identity, _count(shards), ending)
    try:
        new.mkdir()
        for done in arrange(directory, new, shards, finished):
            arranged.add(done)
        arranged.commit()
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        arranged.remove()
        error.add_note(f"{_describe(directory, journal)} kept: {GO_ON}")
        journal.close()
        raise
    try:
        arranged.take_place_of(journal)
        shutil.rmtree(directory, ignore_errors=True)  # the next run removes a rest
    except BaseException:
        journal.close()
        arranged.close()
        raise
    return new, arranged


def _left_behind(out: Path, resume: bool | None) -> Iterator[tuple[Path, Journal]]:
    """(directory, journal) of runs for `out` that have ended with finished parts; the rest of others is removed."""
    pattern = re.compile(re.escape(f".{out.name}.partial-") + rf"(\d+)(\.journal)?({re.escape(OTHER)})?")
    matches = [match for match in map(pattern.fullmatch, os.listdir(out.parent)) if match]
    for pid in sorted({match[1] for match in matches}):
        path = out.with_name(f".{out.name}.partial-{pid}.journal")
        names = [out.with_name(match[0]) for match in matches if match[1] == pid]
        if not path.exists():
            if not alive(int(pid)):
                _clear(names, ())
            continue
        try:
            journal = Journal.open(path)
        except CheckpointError as error:
            if resume is not False:
                kept = out.with_name(path.stem)
                raise CheckpointError(f"{error}; resume=False (--restart) removes it and {kept}") from error
            _clear(names, ())
            continue
        if journal is None:
            if resume and path.exists():
                raise CheckpointError(
                    f"{out.with_name(path.stem)}: another run is still writing it; wait until it has ended"
                )
            continue
        directory = journal.directory
        _clear(names, (path, directory))  # what a run left that was killed while it arranged
        if journal.finished and directory.is_dir():
            yield directory, journal
        else:
            _remove(directory, journal)


def _clear(paths: Sequence[Path], but: Sequence[Path]) -> None:
    for path in paths:
        if path in but:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _remove(directory: Path, journal: Journal) -> None:
    """The directory first: a journal alone counts as nothing, a directory alone could be a living run's."""
    if directory.exists():
        shutil.rmtree(directory)
    journal.remove()


def _differences(then: Any, now: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(keys, then, now) of all that distinguishes two identities."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*then, *now]):
            yield from _differences(then.get(key), now.get(key), (*keys, key))
    elif then != now:
        yield keys, then, now
