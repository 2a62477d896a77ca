"""`load`: a packed directory as a transformers model, in one line, with every shortcoming an error."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..backends import select
from ..checkpoint.packed import PackedCheckpoint
from ..dense.model import model_class, refused_by_transformers
from ..nn.linear import packed_modules
from ..nn.loading import check_whole
from . import quantizer  # noqa: F401  (registers the method)


def load(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    activations: str = "exact",
) -> Any:
    """The model of a packed directory, in evaluation mode, on `device`.

    Its class is the one that config.json names (`architectures`), else that of a causal language model.
    dtype: of everything that is not packed; None is the checkpoint's own. backend: a name from backends.BACKENDS; None
    takes the first that serves the device. activations: "exact", or "int8" for the fast mode of the CPU, which rounds
    the inputs of packed layers for each token and group. Files are mapped; on the CPU packed tensors are used where
    they lie.

    Raises CheckpointError for anything missing, misshapen or of an unknown version, UnsupportedError when
    no backend serves the device with such activations.
    """
    checkpoint = PackedCheckpoint.open(path)
    for module in checkpoint.modules.values():
        select(module.layout, torch.device(device).type, backend, activations)
    with refused_by_transformers(checkpoint.path):
        loaded: Any = model_class(checkpoint.path).from_pretrained(
            path,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, report = loaded
    check_whole(checkpoint.path, report)
    for _, layer in packed_modules(model):
        layer.wanted_backend, layer.activations = backend, activations
    return model.to(device).eval()
