"""`load`: a packed directory as a transformers model, in one line, with every shortcoming an error."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..backends import select
from ..checkpoint.packed import PackedCheckpoint
from ..errors import CheckpointError
from ..nn.linear import packed_modules
from . import quantizer  # noqa: F401  (registers the method)


def load(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    activations: str = "exact",
) -> Any:
    """The causal language model of a packed directory, in evaluation mode, on `device`.

    dtype: of everything that is not packed; None is the checkpoint's own. backend: a name from backends.BACKENDS; None
    takes the first that serves the device. activations: "exact", or "int8" for the fast mode of the CPU, which rounds
    the inputs of packed layers for each token and group. Files are mapped; on the CPU packed tensors are used where
    they lie.

    Raises CheckpointError for anything missing, misshapen, unexpected or of an unknown version, UnsupportedError when
    no backend serves the device with such activations.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = PackedCheckpoint.open(path)
    for module in checkpoint.modules.values():
        select(module.layout, torch.device(device).type, backend, activations)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype or "auto",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, report = loaded
    problems = {key: sorted(map(str, value)) for key, value in report.items() if value}
    if problems:
        raise CheckpointError(
            f"{path}: transformers did not load the model whole: "
            + "; ".join(f"{key}: {', '.join(value[:5])}" for key, value in problems.items())
        )
    for _, layer in packed_modules(model):
        layer.wanted_backend, layer.activations = backend, activations
    return model.to(device).eval()
