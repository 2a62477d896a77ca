"""`mpq_manifest.json` in a packed directory: bytes and SHA-256 of the files that say what the weights are.

    {"manifest_version": 1, "files": {"config.json": {"bytes": 2214, "sha256": "..."}, "model.safetensors": ...},
     "carried": {"tokenizer.json": {"bytes": 122050, "sha256": "..."}, "additional_chat_templates/rag.jinja": ...}}

`files` are the safetensors files, their index and config.json, by name. `carried` are tokenizer, licence and the like,
which may be edited: that they differ is worth a word, but no fault. Source: docs/format.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.strict import contained_file, json_bytes, read_json_object, short

MANIFEST_FILE = "mpq_manifest.json"
VERSION = 1
BLOCK_BYTES = 2**22  # hashed at once


def file_entry(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def manifest_text(files: Mapping[str, Mapping[str, Any]], carried: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The manifest of these files: name -> as `file_entry` gives it. carried: names relative to the directory."""
    lists = {"files": dict(sorted(files.items())), "carried": dict(sorted(carried.items()))}
    return json_bytes({"manifest_version": VERSION} | lists)


def manifest_bytes(sizes: Mapping[str, int], carried: Mapping[str, int]) -> int:
    """Exact size of the manifest of files of these sizes."""
    digest = "0" * hashlib.sha256().digest_size * 2
    lists = [{name: {"bytes": size, "sha256": digest} for name, size in each.items()} for each in (sizes, carried)]
    return len(manifest_text(*lists))


def read_manifest(directory: Path) -> dict[str, dict[str, Any]] | None:
    """Name -> bytes and sha256 of every listed file; None without a manifest. Raises CheckpointError."""
    path = directory / MANIFEST_FILE
    if not path.exists():
        return None
    data = read_json_object(contained_file(directory, MANIFEST_FILE))
    if data.get("manifest_version") != VERSION:
        raise CheckpointError(
            f"{path}: manifest_version={short(data.get('manifest_version'))}, and this build reads {VERSION}"
        )
    files = data.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise CheckpointError(f"{path}: files must map names to their bytes and sha256")
    return files


def verified_files(directory: Path, used: set[str]) -> Iterator[str]:
    """Hash the files of the manifest and yield each name that is as it was written.

    used: names of files that must be listed. Raises CheckpointError: no manifest, a file that is missing, not listed,
    or has other bytes.
    """
    files = read_manifest(directory)
    if files is None:
        raise CheckpointError(f"{directory}: has no {MANIFEST_FILE}")
    missing = sorted(used - set(files))
    if missing:
        raise CheckpointError(f"{directory / missing[0]}: is not in {MANIFEST_FILE}; the files are from different runs")
    for name, listed in files.items():
        path = contained_file(directory, name)
        try:
            found = file_entry(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
        for key in ("bytes", "sha256"):
            if found[key] != listed.get(key):
                raise CheckpointError(
                    f"{path}: {key} {found[key]}, and {MANIFEST_FILE} has {short(listed.get(key))}: the file is not "
                    "as it was packed; copy or download it again, or pack the model again"
                )
        yield name


def changed_files(directory: Path) -> dict[str, str]:
    """Carried file -> how it differs from what was packed: "missing" or "changed". Raises CheckpointError."""
    path, out = directory / MANIFEST_FILE, {}
    carried = read_json_object(contained_file(directory, MANIFEST_FILE)).get("carried", {})
    if not isinstance(carried, dict) or not all(isinstance(entry, dict) for entry in carried.values()):
        raise CheckpointError(f"{path}: carried must map names to their bytes and sha256")
    for name, listed in carried.items():
        folder, _, last = name.rpartition("/")
        try:
            found = file_entry(contained_file(directory / folder, last, directory))
        except (CheckpointError, OSError):
            out[name] = "missing"
            continue
        if found != listed:
            out[name] = "changed"
    return out
