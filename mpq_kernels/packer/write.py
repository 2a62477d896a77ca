"""The loop of packing: make each part, or take it over from a run that was killed, and put it on disk.

    make -> write -> note in the journal -> [now and then: sync the file, then the journal]

A part counts from the moment when its line of the journal is on disk, which its tensors then are already.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..dense.checkpoint import DenseCheckpoint
from ..errors import CheckpointError
from ..files.safetensors import NewFile
from .journal import Finished, Journal
from .parts import Part, Shard, digest
from .unfinished import Work

COMMIT_SHARE = 10  # work goes on for so many times as long as putting it on disk took, before that is done again


def write_parts(source: DenseCheckpoint, shards: Sequence[Shard], work: Work) -> None:
    """Make every part that is not finished yet, and write the files of all.

    Raises CheckpointError, also for a finished part that is damaged, or was made of something else than is there now.
    """
    finished = work.finished
    begun = {shard.name for shard in shards if any(part.name in finished for part in shard.parts)}
    for path in work.directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in begun:
            path.unlink()
    for shard in shards:
        open_file = NewFile.reopen if shard.name in begun else NewFile.create
        with open_file(work.directory / shard.name, shard.specs) as file, _commits(file, work.journal) as commit:
            for part in shard.parts:
                if part.name in finished:
                    _take_over(part, finished[part.name], file, source, work)
                else:
                    _make(part, file, source, work.journal)
                    commit()


def _make(part: Part, file: NewFile, source: DenseCheckpoint, journal: Journal) -> None:
    made = part.make()
    for name, (start, _) in part.places.items():
        file.write(name, start, made.tensors[name])
    output = digest(made.tensors[name] for name in part.places)
    journal.add(Finished(part.name, part.key, made.inputs, part.places, output, made.error, made.zero_groups))
    for name in made.inputs:
        source.release(name)


def _take_over(part: Part, done: Finished, file: NewFile, source: DenseCheckpoint, work: Work) -> None:
    """Accept a part of an earlier run. Raises CheckpointError when it, or what it was made of, has changed."""
    tensors = {name: file.read(name, *place) for name, place in part.places.items()}
    if digest(tensors.values()) != done.output:
        raise CheckpointError(f"{file.path}: {part.name} is not as its run left it; start over (--restart)")
    touched = [name for name in done.inputs if any(f.name in work.touched for f in source.tensors[name].files)]
    if touched:
        if part.digests() != done.inputs:
            raise CheckpointError(
                f"{source.tensors[touched[0]]}: has changed since {part.name} was finished; start over (--restart), or "
                "bring the old file back"
            )
        for name in done.inputs:
            source.release(name)
    part.restore(tensors, done)


@contextmanager
def _commits(file: NewFile, journal: Journal) -> Iterator[Callable[[], None]]:
    """Yields what to call when a part is finished: now and then it puts the file and the journal on disk.

    At the end, and also when the block fails, all that is finished is put there.
    """
    due = 0.0

    def now() -> None:
        """Put all that is finished on disk, the file before the journal that vouches for it."""
        nonlocal due
        start = time.monotonic()
        file.sync()
        journal.commit()
        end = time.monotonic()
        due = end + COMMIT_SHARE * (end - start)

    try:
        yield lambda: now() if time.monotonic() >= due else None
    finally:
        now()
