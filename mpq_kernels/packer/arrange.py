"""Finished parts brought from the files of one plan to their places in those of another.

A part that another plan leaves as it was has tensors of the same names and lengths, at other places perhaps. Its bytes
are compared with the journal when it is taken over, as those of any finished part (write.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError
from ..files.safetensors import DTYPES, NewFile, read_header
from ..files.strict import fsync_directory
from .journal import Finished
from .parts import Shard


def arrange(old: Path, new: Path, shards: Sequence[Shard], finished: Mapping[str, Finished]) -> list[Finished]:
    """Write those of the files of `shards` that hold finished parts, and these parts, into the empty directory `new`.

    Returns the parts with their places there. Raises CheckpointError for a file in `old` that is damaged or gone;
    OSError.
    """
    moved = []
    with ExitStack() as files:
        held: dict[str, NewFile] = {}
        for path in sorted(old.glob("*.safetensors")):
            specs = {name: (DTYPES[entry.dtype], entry.shape) for name, entry in read_header(path).tensors.items()}
            held |= dict.fromkeys(specs, files.enter_context(NewFile.reopen(path, specs)))
        for shard in shards:
            parts = [part for part in shard.parts if part.name in finished]
            if not parts:
                continue
            with NewFile.create(new / shard.name, shard.specs) as file:
                for part in parts:
                    done = finished[part.name]
                    for name, (start, _) in part.places.items():
                        if name not in held:
                            raise CheckpointError(f"{old}: holds no {name}, which its run had finished")
                        file.write(name, start, held[name].read(name, *done.places[name]))
                    moved.append(replace(done, places=part.places))
                file.sync()
    fsync_directory(new)
    return moved
