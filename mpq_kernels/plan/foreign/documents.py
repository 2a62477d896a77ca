"""A foreign file turned into plain values, distrusted: strict JSON, safe YAML, text, and what torch.save wrote.

A pickle runs code while it is loaded, so none is loaded, whatever its name: only the zip archives that torch.save
writes are, by torch's own restricted reader (`weights_only=True`), which knows tensors and plain containers.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, PlanError
from ...files.strict import parse_json, short

MAX_BYTES = 64 * 2**20  # as for our own plans
MAX_YAML_BYTES = 4 * 2**20  # about six seconds of PyYAML; the longest plan of MixDQ has 51 kB
MAX_DEPTH = 100  # of YAML collections
PICKLE_SUFFIXES = (".pkl", ".pickle", ".p")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
YAML_SUFFIXES = (".yaml", ".yml")
ZIP_MAGIC, PICKLE_MAGIC = b"PK\x03\x04", b"\x80"
JSON_COPY = "import json, pickle; json.dump(pickle.load(open('FILE', 'rb')), open('FILE.json', 'w'))"


@dataclass(frozen=True)
class Document:
    """What a file holds. kind: "json", "yaml", "torch" or "text". where: the file, for messages."""

    where: str
    kind: str
    value: Any


def read_document(path: str | os.PathLike[str], kinds: Sequence[str]) -> Document:
    """The content of a file that should be of one of `kinds`. Raises PlanError, before anything in it is executed."""
    path = Path(path)
    where = str(path)
    data = _read(path)
    kind = _kind(path, data)
    if kind == "text" and "yaml" in kinds and "text" not in kinds:
        kind = "yaml"  # YAML has no mark of its own
    if kind not in kinds:
        raise PlanError(f"{where}: holds {kind}, and this format is read from {' or '.join(kinds)}")
    if kind == "torch":
        return Document(where, kind, _torch_value(path))
    if kind == "yaml":
        return Document(where, kind, _yaml_value(data, where))
    try:
        return Document(where, kind, parse_json(data, where) if kind == "json" else data.decode("utf-8").strip())
    except CheckpointError as error:
        raise PlanError(str(error)) from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{where}: is neither UTF-8 text nor a file of torch.save ({error.reason})") from error


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise PlanError(f"{path}: is not a file; give the file that holds the plan")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise PlanError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > MAX_BYTES:
        raise PlanError(f"{path}: larger than {MAX_BYTES} bytes, the limit for a plan; is it a file of weights?")
    return data


def _kind(path: Path, data: bytes) -> str:
    """Which kind a file is, by its content first. Raises PlanError for a pickle."""
    if data.startswith(ZIP_MAGIC):
        return "torch"
    suffix = path.suffix.lower()
    if data.startswith(PICKLE_MAGIC) or suffix in PICKLE_SUFFIXES + TORCH_SUFFIXES:
        raise PlanError(
            f"{path}: is a pickle, or claims to be one by its name; loading one runs whatever code it holds, so it was "
            f"not loaded. If you trust where it comes from, write its values as JSON yourself: {JSON_COPY}"
        )
    if suffix in YAML_SUFFIXES:
        return "yaml"
    return "json" if data.lstrip()[:1] in (b"{", b"[") else "text"


def _torch_value(path: Path) -> Any:
    """What torch.save wrote: plain containers, numbers, strings and tensors. Raises PlanError."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises what its parts raise
        raise PlanError(f"{path}: is a damaged zip archive ({error}); copy the file again") from error
    if sum(entry.filename.rpartition("/")[2] == "data.pkl" for entry in entries) != 1:
        raise PlanError(f"{path}: is a zip archive, but not one that torch.save writes (it has no data.pkl)")
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MAX_BYTES:
        raise PlanError(f"{path}: unpacks to {unpacked} bytes, and the limit for a plan is {MAX_BYTES}")
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any type, from torch's reader
        reason = str(error).split("\n", 1)[0][:300]
        raise PlanError(
            f"{path}: torch's restricted reader refuses it ({type(error).__name__}: {reason}); only plain dicts, "
            "lists, numbers, strings and tensors are loaded. Save such values again, or write them as JSON"
        ) from error


def _yaml_value(data: bytes, where: str) -> Any:
    """Value of a YAML text without aliases, tags of other languages and repeated keys. Raises PlanError."""
    import yaml

    class Strict(yaml.SafeLoader):
        """Safe tags only; nothing may be said twice."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            """As the base class does it, without aliases and to a bounded depth."""
            if self.check_event(yaml.AliasEvent):
                raise PlanError(
                    f"{where}: line {self.peek_event().start_mark.line + 1}: aliases are not read; repeat it"
                )
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise PlanError(f"{where}: nested more than {MAX_DEPTH} deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen = set()
            for key, _ in node.value:
                if not isinstance(key.value, str):
                    continue  # a key that is a list or a table, which the next lines refuse
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise PlanError(f"{where}: line {line}: the key {short(key.value)} appears twice; remove one")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    if len(data) > MAX_YAML_BYTES:
        raise PlanError(f"{where}: {len(data)} bytes of YAML, more than the limit of {MAX_YAML_BYTES}")
    try:
        return yaml.load(data.decode("utf-8"), Loader=Strict)
    except PlanError:
        raise
    except Exception as error:  # PyYAML's constructors raise KeyError, OverflowError and others beside its own
        raise PlanError(f"{where}: is not YAML that is safe to load ({' '.join(str(error).split())[:300]})") from error
