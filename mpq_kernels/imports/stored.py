"""A quantized checkpoint as the readers of formats see it: what its config says, and the headers of its tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..dense.checkpoint import CONFIG_FILE, check_layer_count
from ..errors import CheckpointError
from ..files.shards import StoredTensor, TensorFiles
from ..files.strict import contained_file, read_json_object, short
from .gguf_file import GgufFiles, has_gguf

# Where older programs wrote what is now the quantization_config of config.json.
SIDE_FILES = ("quantize_config.json", "quant_config.json")
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class Stored:
    """config: config.json without what it says of quantization. quantization: that; {} where nothing is said."""

    path: Path
    config: dict[str, Any]
    quantization: dict[str, Any]
    files: TensorFiles

    @classmethod
    def open(cls, model_dir: str | os.PathLike[str]) -> Stored:
        """Check config.json, the index and every header. Raises CheckpointError, also for pickles."""
        path = Path(model_dir)
        if not path.is_dir():
            raise CheckpointError(f"{path}: is not a directory; give that of a quantized model")
        config = read_json_object(contained_file(path, CONFIG_FILE))
        files = GgufFiles.open_gguf(path) if has_gguf(path) else TensorFiles.open_directory(path)
        check_layer_count(path / CONFIG_FILE, config, len(files.tensors))
        said = _said(path, config)
        return cls(path, _without(config), said, files)

    @property
    def method(self) -> str:
        """quant_method, in small letters; "" where none is said."""
        return str(self.quantization.get("quant_method") or self.quantization.get("method") or "").lower()

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every stored tensor by name."""
        return self.files.tensors

    def modules(self, leaf: str) -> Iterator[tuple[str, StoredTensor]]:
        """(module, tensor) of every tensor that is called `leaf` in its module."""
        for name, tensor in self.files.tensors.items():
            module, _, last = name.rpartition(".")
            if last == leaf and module:
                yield module, tensor

    def part(self, module: str, leaf: str) -> StoredTensor:
        """A tensor of a module that must be there. Raises CheckpointError."""
        found = self.files.tensors.get(f"{module}.{leaf}")
        if found is None:
            raise CheckpointError(f"{self.path}: no file holds {short(f'{module}.{leaf}')}, which {module} needs")
        return found

    def optional(self, module: str, leaf: str) -> StoredTensor | None:
        """A tensor of a module, None where it has none."""
        return self.files.tensors.get(f"{module}.{leaf}")

    def where(self, key: str = "") -> str:
        """The config, for messages."""
        return f"{self.path / CONFIG_FILE}: quantization_config{f'.{key}' if key else ''}"


def check_matrix(tensor: StoredTensor, dtypes: tuple[torch.dtype, ...], what: str) -> tuple[int, int]:
    """Shape of a stored matrix. Raises CheckpointError for another dtype or number of dimensions, or an empty one."""
    if tensor.dtype not in dtypes or len(tensor.shape) != 2 or 0 in tensor.shape:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(f"{tensor}: {what} are a matrix of {wanted}")
    return tensor.shape[0], tensor.shape[1]


def _said(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    for part in (config, config.get("text_config")):
        for key in CONFIG_KEYS:
            found = part.get(key) if isinstance(part, dict) else None
            if isinstance(found, dict):
                return found
            if found is not None:
                raise CheckpointError(f"{path / CONFIG_FILE}: {key}={short(found)} is not an object")
    for name in SIDE_FILES:
        if (path / name).exists():
            return read_json_object(contained_file(path, name))
    return {}


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    out = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    text = out.get("text_config")
    if isinstance(text, dict):
        out["text_config"] = {key: value for key, value in text.items() if key not in CONFIG_KEYS}
    return out
