"""What lies beside config.json and the weights of a checkpoint, and is carried along when it is packed.

    tokenizer.json   chat_template.jinja   additional_chat_templates/rag.jinja   1_Pooling/config.json   LICENSE   ...

A list says what is left out, and why. Everything else is carried, so that a kind of file that nobody has thought of
here is not lost in silence. Folders follow the same rules; one that is too large or too deep is left out whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from ..errors import CheckpointError
from ..files.strict import contained_file, linked_home

MAX_FILE_BYTES = 256_000_000  # the largest tokenizers on the Hub are about 35 MB
MAX_FOLDER_BYTES = 1_000_000_000  # carried out of all folders together
MAX_FOLDER_FILES = 1000  # in one folder, with those inside it
MAX_DEPTH = 8

# Patterns of lower-case names -> why such a file or folder is left out. The first that fits is the one that is given.
LEFT_OUT: tuple[tuple[tuple[str, ...], str], ...] = (
    ((".*",), "hidden"),
    (("__pycache__", "*.lock", "*.incomplete", "*.part", "*.tmp", "*~"), "a cache, or left by a program"),
    (("*.safetensors",), "weights that the checkpoint does not use"),
    (("*.index.json",), "an index of weights that are not carried"),
    (
        ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.dill", "*.nemo", "*.mar"),
        "weights or objects in a pickle, which can run code",
    ),
    (
        ("*.gguf", "*.ggml", "*.llamafile", "*.onnx", "*.onnx[._]data*", "*.h5", "*.hdf5", "*.keras", "*.msgpack")
        + ("*.npz", "*.ot", "*.pb", "*.tflite", "*.mlmodel", "*.mlpackage", "*.mlmodelc", "*.engine"),
        "weights in another format",
    ),
    (("*.py", "*.pyc", "*.so", "*.dll", "*.dylib", "*.sh", "*.ipynb"), "code, which is never run"),
    # With peft installed, transformers would load the base model that this file names in place of the packed one.
    (("adapter_config.json",), "belongs to an adapter, whose weights are not carried"),
    (("mpq_manifest.json",), "of another packing"),
)
PICKLE_STARTS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))


def companions(root: Path, used: set[str]) -> dict[str, str | None]:
    """Every file and folder of a checkpoint's directory but those in `used`: name -> why it is left out, None if not.

    Names are relative to `root`, with "/" between folder and file and behind a folder that is left out whole; sorted,
    the files before the folders.
    """
    names = sorted(set(os.listdir(root)) - used)
    out = {name: why_left(root, root, name) for name in names if not (root / name).is_dir()}
    room = MAX_FOLDER_BYTES
    for name in names:
        if name in out:
            continue
        reason, held = _why_folder_left(root, root, name), {}
        if reason is None:
            held = dict(islice(_files(root, Path(name)), MAX_FOLDER_FILES + 1))
            carried = sum((root / path).stat().st_size for path, why in held.items() if why is None)
            if len(held) > MAX_FOLDER_FILES:
                reason = f"holds more than {MAX_FOLDER_FILES} files"
            elif carried > room:
                reason = (
                    f"{carried} bytes, over the {room} that are left of the limit of {MAX_FOLDER_BYTES} for folders"
                )
            else:
                room -= carried
        out |= held if reason is None else {f"{name}/": reason}
    return out


def why_left(root: Path, folder: Path, name: str) -> str | None:
    """Why a file of a folder in the checkpoint's directory `root` is not carried along, None when it is."""
    reason = _by_name(name)
    if reason is not None:
        return reason
    if not (folder / name).is_file():
        return "not a regular file"
    try:
        path = contained_file(folder, name, root)
        with open(path, "rb") as file:
            start = file.read(2)
        size = path.stat().st_size
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if start in PICKLE_STARTS:
        return "a pickle, which can run code"
    return f"{size} bytes, over the limit of {MAX_FILE_BYTES}" if size > MAX_FILE_BYTES else None


def _files(root: Path, folder: Path) -> Iterator[tuple[str, str | None]]:
    """(name relative to root, why it is left out) of all in a folder: its files, then its folders, sorted by name."""
    directory = root / folder
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in islice(entries, MAX_FOLDER_FILES + 1))
    except OSError as error:
        yield f"{folder}/", f"cannot be read ({error.strerror or error})"
        return
    folders = [name for name in names if (directory / name).is_dir()]
    for name in names:
        if name not in folders:
            yield str(folder / name), why_left(root, directory, name)
    for name in folders:
        reason = _why_folder_left(root, directory, name)
        if reason is None and len(folder.parts) >= MAX_DEPTH:
            reason = f"more than {MAX_DEPTH} folders deep"
        if reason is None:
            yield from _files(root, folder / name)
        else:
            yield f"{folder / name}/", reason


def _why_folder_left(root: Path, directory: Path, name: str) -> str | None:
    reason, path, home = _by_name(name), directory / name, linked_home(root)
    same = home is not None and path.resolve() == (home / path.relative_to(root)).resolve()
    if reason is None and path.is_symlink() and not same:
        reason = "a link to a folder"  # it may lead anywhere, also back here
    if reason is None and (not name.isprintable() or "\\" in name):
        reason = "not a plain name"
    return reason


def _by_name(name: str) -> str | None:
    lower = name.lower()
    return next((why for patterns, why in LEFT_OUT if any(fnmatchcase(lower, each) for each in patterns)), None)
