"""The journal of a packing and the manifest of a packed directory, mutated."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from random import Random

from mpq_kernels.checkpoint.manifest import MANIFEST_FILE, changed_files, read_manifest, verified_files
from mpq_kernels.packer.journal import VERSION, Finished, Journal

from .campaign import Run
from .mutate import mutate_bytes, mutate_json
from .world import make_packed, read_json

IDENTITY = {"mpq_kernels": "0.1.0", "quantizer": "rtn", "source": {"model.safetensors": {"bytes": 9, "modified": 7}}}
PARTS = (
    Finished("packed a", "k1", {"a.weight": "0" * 64}, {"model.safetensors": (0, 64)}, "1" * 64, 0.5, 2),
    Finished("kept b", "k2", {"b": "2" * 64}, {"model.safetensors": (64, 8)}, "3" * 64),
)
LINES = [{"journal": VERSION, "parts": 3, "identity": IDENTITY}, *map(asdict, PARTS)]
KNOWN = ("journal", "parts", "identity", "part", "inputs", "output", "error", "key",
         "places", "zero_groups", "files", "carried", "bytes", "sha256",
         "manifest_version", "config.json", "../config.json", "/etc/passwd", "model.safetensors", "link")  # fmt: skip


def prepare_journal(folder: Path) -> Run:
    """Cases: `Journal.open`; what is accepted has the types that resuming relies on, and takes another line."""

    def run(chance: Random) -> str:
        path = Path("journal")
        lines = [json.dumps(line).encode() for line in LINES]
        for _ in range(chance.choice((1, 1, 2))):
            at = chance.randrange(len(lines))
            lines[at] = mutate_json(chance, LINES[at % len(LINES)], KNOWN)
        if chance.random() < 0.2:
            chance.shuffle(lines)
        data = b"\n".join(lines) + b"\n"
        path.write_bytes(mutate_bytes(chance, data) if chance.random() < 0.3 else data)
        journal = Journal.open(path)
        assert journal is not None
        try:
            assert isinstance(journal.identity, dict) and type(journal.parts) is int
            for name, part in journal.finished.items():
                assert isinstance(name, str) and isinstance(part.output, str)
                assert all(isinstance(text, str) for pair in part.inputs.items() for text in pair)
                assert isinstance(part.error, float | int | None)
            journal.add(Finished("more", "k3", {}, {}, "4" * 64))
            journal.commit()
            before = dict(journal.finished)
        finally:
            journal.close()
        again = Journal.open(path)
        assert again is not None
        try:
            assert str(again.finished) == str(before)  # NaN is not equal to itself
        finally:
            again.close()
        return "opened"

    return run


def prepare_manifest(folder: Path) -> Run:
    """Cases: the manifest read, its files hashed, the carried ones compared."""
    packed = make_packed(folder)
    manifest = read_json(packed / MANIFEST_FILE)

    def run(chance: Random) -> str:
        path = Path("packed")
        if not path.exists():
            shutil.copytree(packed, path)
            (path / "link").symlink_to("/etc/passwd")
            (path / "loop").symlink_to("loop")
        (path / MANIFEST_FILE).write_bytes(mutate_json(chance, manifest, KNOWN))
        read_manifest(path)
        changed = changed_files(path)
        assert all(how in ("missing", "changed") for how in changed.values())
        for _ in verified_files(path, {"config.json"}):
            pass
        return "verified"

    return run
