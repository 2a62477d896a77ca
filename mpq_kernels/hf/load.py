"""`load`: a packed directory as a transformers model, in one line, with every shortcoming an error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..backends import select
from ..checkpoint.packed import PackedCheckpoint
from ..dense.model import model_class, refused_by_transformers
from ..errors import CheckpointError, UnsupportedError
from ..nn.linear import packed_modules
from ..nn.loading import check_whole
from . import quantizer  # noqa: F401  (registers the method)
from .compiled import compile_decoding

# Keywords of from_pretrained that `load` decides about, and why another value cannot be had.
DECIDED = {
    "local_files_only": "nothing is downloaded: give a local directory",
    "trust_remote_code": "code that comes with a checkpoint is never run",
    "use_safetensors": "packed models are safetensors",
    "output_loading_info": "what it would say of a packed model is an error",
    "quantization_config": "config.json says how the model is packed",
    "state_dict": "the tensors are those of the directory",
    "torch_dtype": "its name is dtype",
    "subfolder": "give the folder itself",
    "gguf_file": "packed models are safetensors",
    "variant": "packed files have one name",
    "key_mapping": "packed tensors are found by the names that config.json has for them",
} | dict.fromkeys(
    ("tp_plan", "tp_size", "device_mesh", "distributed_config"),
    "a packed weight is not split over devices; device_map puts whole layers on several",
)
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential", "disk")  # words of device_map that name no device


def load(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    activations: str = "exact",
    compile: bool = False,
    **options: Any,
) -> Any:
    """The model of a packed directory, in evaluation mode, on `device` (the CPU without one).

    Its class is the one that config.json names (`architectures`), else the one that transformers has for its type
    (dense/model.py). dtype: of everything that is not packed; None is the checkpoint's own. backend: a name from
    backends.BACKENDS; None takes the first that serves the device. activations: "exact", or "int8" for the fast mode of
    the CPU, which rounds the inputs of packed layers for each token and group. compile: `generate` runs its decode step
    through torch.compile (hf/compiled.py), which the first call waits for. options: further keywords of
    `from_pretrained`, such as attn_implementation, device_map (instead of a device) and max_memory. Files are mapped;
    on the CPU packed tensors are used where they lie.

    Raises CheckpointError for anything missing, misshapen or of an unknown version, UnsupportedError when no backend
    serves the device with such activations, for options that are decided here or that nobody knows, and for a model or
    a machine that compiles nothing.
    """
    _check_options(device, options)
    checkpoint = PackedCheckpoint.open(path)
    for kind in _device_types(options.get("device_map", device or "cpu")):
        for module in checkpoint.modules.values():
            select(module.layout, kind, backend, activations)
    with _unknown_options(options), refused_by_transformers(checkpoint.path):
        loaded: Any = model_class(checkpoint.path).from_pretrained(
            path,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    model, report = loaded
    check_whole(checkpoint.path, report)
    for _, layer in packed_modules(model):
        layer.wanted_backend, layer.activations = backend, activations
        layer.rebind()
    model = (model if "device_map" in options else model.to(device or "cpu")).eval()
    if compile:
        compile_decoding(model)
    return model


def _check_options(device: torch.device | str | None, options: dict[str, Any]) -> None:
    """Raise UnsupportedError for options that cannot be had."""
    for name in options:
        if name in DECIDED:
            raise UnsupportedError(f"load takes no {name}: {DECIDED[name]}")
    if options.get("device_map", True) is None:
        del options["device_map"]
    if device is not None and "device_map" in options:
        raise UnsupportedError("give either device or device_map, exactly one of them")


@contextmanager
def _unknown_options(options: Mapping[str, Any]) -> Iterator[None]:
    """What transformers says of a keyword that it does not know is no fault of the files."""
    try:
        yield
    except CheckpointError as error:
        cause = error.__cause__
        unknown = [name for name in options if isinstance(cause, TypeError) and f"'{name}'" in str(cause)]
        if not unknown:
            raise
        raise UnsupportedError(f"load takes no {unknown[0]}: transformers does not know it ({cause})") from error


def _device_types(placed: Any) -> set[str]:
    """Types of the devices that a device, or a device_map, names."""
    named = placed.values() if isinstance(placed, dict) else [placed]
    return {"cuda" if isinstance(each, int) else torch.device(each).type for each in named if each not in PLACEMENTS}
