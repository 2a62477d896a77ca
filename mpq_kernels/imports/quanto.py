"""optimum-quanto, qint8: as its `save_pretrained` and `safe_save` write it.

    <module>.weight._data int8 [N, K]   .weight._scale [N, 1]   .input_scale, .output_scale      W = code * scale

The last two are of quantized inputs and outputs, which stay in 16 bits here. Source: optimum-quanto 0.2.7
(tensor.weights.qbytes, tensor.weights.qbits).
"""

from __future__ import annotations

import torch

from ..errors import CheckpointError
from .signed import SignedCodes
from .stored import Stored
from .weight import Found

CODES = "weight._data"
SCALES = ("input_scale", "output_scale")


def is_quanto(stored: Stored) -> bool:
    """Whether the tensors are quanto's, whatever the config says."""
    return stored.method in ("", "quanto") and any(name.endswith(".weight._scale") for name in stored.tensors)


def read_quanto(stored: Stored) -> Found:
    """Every quantized weight. Raises CheckpointError."""
    found = Found()
    for inner, codes in stored.modules("_data"):
        if inner.endswith("._data"):
            raise CheckpointError(
                f"{codes}: packed codes of 2 or 4 bits (qint2, qint4), of which no file says how many are in a row"
            )
        if codes.dtype != torch.int8:
            raise CheckpointError(f"{codes}: floats of 8 bits are no integers, and only those are imported")
        name = inner.removesuffix(".weight")
        weight = SignedCodes(name, "quanto", 8, codes, stored.part(inner, "_scale"))
        found.add(weight.weight(stored.files))
        found.used.update(f"{name}.{leaf}" for leaf in SCALES if f"{name}.{leaf}" in stored.tensors)
    if not found.weights:
        raise CheckpointError(f"{stored.path}: no file holds a {CODES}; nothing is quantized in the form of quanto")
    return found
