"""A dense Hugging Face checkpoint on disk, distrusted: its config, its tensors, and the linears of its model.

The model is built on the meta device (shapes, no memory) to learn which modules are linears (kinds.py); each is matched
with the tensor that feeds it, and a misfit is refused here, before anything is quantized. Code that comes with a
checkpoint is never run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.shards import INDEX_FILE, SINGLE_FILE, StoredTensor, TensorFiles
from ..files.strict import contained_file, read_json_object, short
from .companions import companions
from .conversions import Origin
from .decoded import METHODS, DecodedTensor, decoded_tensors, known_method
from .linears import LinearSpec
from .model import CONFIG_FILE, config_parts
from .names import ModelMap

COMPUTE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

__all__ = ["CONFIG_FILE", "LinearSpec", "DenseCheckpoint"]


@dataclass(frozen=True, eq=False)
class DenseCheckpoint:
    """An opened dense checkpoint. `path`: its directory. `config`: config.json. `dtype`: what the model computes in.

    tensors: every tensor by name, with its file, dtype and shape; those that are stored in fp8 or mxfp4 as decoded.py
    reads them.
    """

    path: Path
    config: dict[str, Any]
    dtype: torch.dtype
    files: TensorFiles
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, model_dir: str | os.PathLike[str]) -> DenseCheckpoint:
        """Check config.json, the index and every header. Reads no tensor data and builds no model.

        Raises CheckpointError: not a directory, pickled or missing weights, truncated files, names that lead out of
        the directory, an already quantized model, more layers than tensors.
        """
        path = Path(model_dir)
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: is not a directory; give a local one (`hf download NAME --local-dir DIR` fetches a model)"
            )
        config = read_json_object(contained_file(path, CONFIG_FILE))
        check_dense(path / CONFIG_FILE, config)
        files = TensorFiles.open_directory(path)
        check_layer_count(path / CONFIG_FILE, config, len(files.tensors))
        dtype = compute_dtype(path / CONFIG_FILE, config, files)
        return cls(path, config, dtype, files, decoded_tensors(path / CONFIG_FILE, config, files, dtype))

    @property
    def decodes(self) -> bool:
        """Whether some of its weights are stored quantized."""
        return self.tensors is not self.files.tensors

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """A tensor, or its index-th matrix alone, [1, ...]: mapped, without a copy, or decoded. CheckpointError."""
        tensor = self.tensors.get(name)
        if isinstance(tensor, DecodedTensor):
            return tensor.read(self.files, index)
        whole = self.files.read(name)
        return whole if index is None else whole[index : index + 1]

    def release(self, name: str) -> None:
        """Give back the memory that the bytes of a tensor took; it can still be read, from the file."""
        tensor = self.tensors[name]
        if not isinstance(tensor, DecodedTensor):  # whose bytes are let go of when it has been decoded
            self.files.release(name)

    def weight(self, spec: LinearSpec) -> torch.Tensor:
        """W [N, K] of a linear: mapped, or made of what is stored, as transformers makes it. Raises CheckpointError."""
        cut = None if spec.expert is None else spec.expert.cut
        if spec.origin is None and cut is not None:
            return replace(cut, index=0).weight(self.read(spec.tensor, cut.index))
        return spec.weight_of(self.read(spec.tensor) if spec.origin is None else self.made(spec.origin))

    def bias(self, spec: LinearSpec) -> torch.Tensor | None:
        """Bias [N] of a linear, None when it has none. Raises CheckpointError."""
        if spec.bias_tensor is None:
            return None
        return spec.bias_of(self.read(spec.bias_tensor) if spec.bias_origin is None else self.made(spec.bias_origin))

    def made(self, origin: Origin) -> torch.Tensor:
        """A parameter, or one expert of it, as transformers makes it of stored tensors. Raises CheckpointError."""
        return origin.read(self.read)

    def release_weight(self, spec: LinearSpec) -> None:
        """`release` of all that is stored of a linear's weight."""
        for name in (spec.tensor,) if spec.origin is None else spec.origin.tensors:
            self.release(name)

    def linears(self) -> list[LinearSpec]:
        """Every linear of the model in module order, with the tensor that feeds it, then every expert's.

        Experts have the names of their tensors in the files; those that are stored together, the names of
        docs/plans.md. Raises CheckpointError: unknown model type, a missing tensor, a shape or dtype that does not
        fit the model.
        """
        return list(self.model_map.linears)

    def packable(self) -> list[LinearSpec]:
        """All that a plan may name: the embeddings that can be packed, in module order, then `linears`."""
        return [*self.model_map.embeddings, *self.model_map.linears]

    @cached_property
    def model_map(self) -> ModelMap:
        """How the model's parameters map to the stored tensors."""
        return ModelMap.build(self.path, self.config, self.tensors)

    def other_files(self) -> list[str]:
        """Tokenizer, chat templates, licence and all else to carry along: names relative to `path`, "/" in folders."""
        return [name for name, reason in self._companions.items() if reason is None]

    def left_files(self) -> dict[str, str]:
        """Name -> reason of every file or folder that is neither read nor carried along."""
        return {name: reason for name, reason in self._companions.items() if reason is not None}

    @cached_property
    def _companions(self) -> dict[str, str | None]:
        used = {file.name for file in self.files.files} | {CONFIG_FILE}
        used |= set() if SINGLE_FILE in used else {INDEX_FILE}
        return companions(self.path, used)


def check_dense(where: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError when a config says that its weights are quantized in a form that decoded.py does not read,
    or lie under a name of their own.
    """
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            found = part.get(key)
            if found is not None:
                if part is config and key == "quantization_config" and known_method(found):
                    continue
                method = found.get("quant_method", key) if isinstance(found, dict) else key
                raise CheckpointError(
                    f"{where}: the model is already quantized with {short(method)}, and only "
                    f"{' and '.join(METHODS)} are read: `mpq import` takes "
                    "what others wrote, code by code; or dequantize it first"
                )
    if config.get("transformers_weights") is not None:
        raise CheckpointError(f"{where}: transformers_weights names a weights file; rename that to model.safetensors")


def check_layer_count(where: Path, config: dict[str, Any], tensors: int) -> None:
    """Raise CheckpointError for more layers than tensors: building such a model would only cost time and memory."""
    for part in config_parts(config):
        for key in LAYER_COUNTS:
            count = part.get(key)
            if type(count) is int and count > tensors:
                raise CheckpointError(f"{where}: {key}={count}, and the checkpoint holds only {tensors} tensors")


def compute_dtype(where: Path, config: dict[str, Any], files: TensorFiles) -> torch.dtype:
    """config.json's dtype; without one, as transformers does, that of the first stored floating tensor, or bf16 where
    weights are quantized.
    """
    text = config.get("text_config")
    named = [config.get("dtype"), config.get("torch_dtype")]
    if isinstance(text, dict):
        named += [text.get("dtype"), text.get("torch_dtype")]
    for name in named:
        if name is not None and name != "auto":
            if not isinstance(name, str) or name not in COMPUTE_DTYPES:
                raise CheckpointError(f"{where}: dtype={short(name)} is not one of {sorted(COMPUTE_DTYPES)}")
            return COMPUTE_DTYPES[name]
    if config.get("quantization_config") is not None:
        return torch.bfloat16
    for tensor in files.tensors.values():
        if tensor.dtype in COMPUTE_DTYPES.values():
            return tensor.dtype
    raise CheckpointError(f"{files.files[0]}: holds no fp32, fp16 or bf16 tensor; only those can be packed")
