"""Files that are distrusted when read and durable when written: strict JSON, contained names, fsync, free space.

Reading: a checkpoint may come from anybody, so JSON is bounded and may not repeat a key, and a file name in it must
name a regular file of its own directory. Writing: nothing is visible under its final name before it is on disk.
"""

from __future__ import annotations

import difflib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MAX_JSON_BYTES = 100_000_000  # the limit that safetensors sets for its own headers; config files are far smaller
# What values take in memory, by the marks of their text, in units of about 45 bytes. The limit is reached by 240,000
# tensors in one safetensors header, a million in an index, 10 million numbers in a plan.
JSON_MARKS = ((b"{", 5), (b"[", 2), (b",", 1), (b":", 4), (b'"', 1))
MAX_JSON_MARKS = 10_000_000
MAX_COMPARED_CHARS = 1000  # of a name that is compared; longer ones are no slips
MAX_COMPARED = 5000  # names that a misspelt one is compared with: about 50 ms
MAX_INT_DIGITS = 19  # every length and offset fits 63 bits; longer ones would only cost time


def short(value: object, limit: int = 80) -> str:
    """repr of something from a hostile file, cut so that a message stays readable."""
    text = repr(value) if not isinstance(value, (list, dict)) or len(value) < limit else f"{type(value).__name__} [...]"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def parse_json(data: bytes, where: str, allow_nonfinite: bool = False) -> Any:
    """Value of a JSON text.

    Raises CheckpointError for bad UTF-8, half a surrogate pair, a repeated key, a huge integer, NaN (unless allowed),
    and more values than fit 500 MB of memory.

    allow_nonfinite: config.json files of some model families hold Infinity, which transformers writes and reads.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{where}: the key {short(name)} appears twice; the file is malformed or forged")
        return out

    def integer(digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_INT_DIGITS:
            raise CheckpointError(f"{where}: an integer of {len(digits)} digits is out of range")
        return int(digits)

    def nonfinite(word: str) -> float:
        if allow_nonfinite:
            return float(word)
        raise CheckpointError(f"{where}: {word} is not JSON")

    marks = sum(data.count(mark) * weight for mark, weight in JSON_MARKS)
    if marks > MAX_JSON_MARKS:
        raise CheckpointError(f"{where}: holds too many values for one file ({len(data)} bytes of JSON)")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_int=integer, parse_constant=nonfinite)
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error}); download or write the file again") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the file."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes of JSON, more than the limit of {MAX_JSON_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    value = parse_json(data, str(path), allow_nonfinite=True)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__} where an object is expected")
    return value


def contained_file(directory: Path, name: str, root: Path | None = None) -> Path:
    """Path of the regular file `name` of `directory`. Raises CheckpointError for every way out of it.

    root: the checkpoint's own directory, where `directory` is a folder in it. A symbolic link may lead out of it only
    in Hugging Face's cache, where <repository>/snapshots/<revision>/<name> points into <repository>/blobs, and from a
    directory of links to the file of the same name beside that which its config.json is a link to.
    """
    where = f"{directory}: file name {short(name)}"
    if not name or name in (".", "..") or not name.isprintable() or "/" in name or "\\" in name:
        raise CheckpointError(f"{where} is not a plain name; files must lie in the checkpoint's own directory")
    path, given = directory / name, root or directory
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
        home = linked_home(given)
        same = home is not None and target == (home / path.relative_to(given)).resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{where}: there is no such file ({error}); download the checkpoint again") from error
    root = given.resolve()
    roots = [root]
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        roots.append(root.parent.parent / "blobs")
    if home is not None and home.name == "blobs" and (home.parent / "snapshots").is_dir():
        roots.append(home)
    if not same and not any(target.is_relative_to(allowed) for allowed in roots):
        raise CheckpointError(f"{where} is a link to {target}, outside the directory; copy the file into it")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{where} is not a regular file")
    return path


def linked_home(root: Path) -> Path | None:
    """Where the files of a checkpoint lie that is a directory of links: beside its config.json. None for others."""
    config = root / "config.json"
    return config.resolve().parent if config.is_symlink() else None


def write_new_file(path: Path, data: bytes) -> None:
    """Write and fsync a file that must not exist yet. Mode 0666 & ~umask. Raises OSError."""
    with create_file(path) as descriptor:
        write_all(descriptor, data)


@contextmanager
def create_file(path: Path) -> Iterator[int]:
    """Descriptor of a new file; fsynced when the block ends. Raises OSError, also when the path exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, fsync, rename. Raises OSError; what was at `path` is then untouched."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with create_file(temporary) as descriptor:
            write_all(descriptor, data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte; os.write alone may stop after 2 GiB."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def fsync_directory(path: Path) -> None:
    """Make renames and new names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(value: object) -> bytes:
    """JSON as Hugging Face writes it: two spaces, keys in their own order, one newline at the end."""
    return (json.dumps(value, indent=2) + "\n").encode()


def close_names(name: str, known: Sequence[str]) -> str:
    """The words "did you mean ...?" for a name that is not among `known`; empty when nothing is close."""
    if len(name) > MAX_COMPARED_CHARS:
        return ""
    close = difflib.get_close_matches(name, dict.fromkeys(known[:MAX_COMPARED]), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
