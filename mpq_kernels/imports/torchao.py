"""torchao, as transformers saves it in safetensors: Int8Tensor and IntxUnpackedToInt8Tensor.

    <module>._weight_qdata int8 [N, K]   ._weight_scale [N, groups]   ._weight_zero_point int8 [N, groups]

The metadata of the file has what else there is of a tensor, as JSON under the name of its weight: its class, the width
of its codes (`target_dtype`), and whether inputs are quantized. Source: torchao 0.18
(quantization.quantize_.workflows.int8, .intx, prototype.safetensors).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.safetensors import read_header
from ..files.strict import parse_json, short
from .signed import SignedCodes
from .stored import Stored
from .weight import Found

CODES, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
WIDTH = re.compile(r"int([1-8])")


def is_torchao(stored: Stored) -> bool:
    """Whether a config is one of torchao."""
    return stored.method == "torchao"


def read_torchao(stored: Stored) -> Found:
    """Every quantized weight. Raises CheckpointError."""
    found = Found()
    metadata: dict[Path, Mapping[str, str]] = {}
    quantized_inputs = 0
    for name, codes in stored.modules(CODES):
        if codes.file not in metadata:
            metadata[codes.file] = read_header(codes.file).metadata
        about = _about(codes.file, metadata[codes.file], f"{name}.weight")
        kind = about.get("_type")
        if kind not in CLASSES:
            raise CheckpointError(
                f"{codes}: {name} is a {short(kind)} of torchao, and only {' and '.join(CLASSES)} are imported: others "
                "hold words in the order of a kernel, floats, or sums that round otherwise"
            )
        data = about.get("_data")
        data = data if isinstance(data, dict) else {}
        quantized_inputs += bool(data.get("act_quant_kwargs") or data.get("activation_quantization"))
        weight = SignedCodes(
            name, "torchao", _bits(codes, kind, data), codes, stored.part(name, SCALE), stored.optional(name, ZERO)
        )
        found.add(weight.weight(stored.files))
    if not found.weights:
        raise CheckpointError(f"{stored.path}: no file holds a {CODES}; pickled tensors of torchao are never read")
    if quantized_inputs:
        found.notes.append(f"inputs of {quantized_inputs} linears are quantized there, and stay in 16 bits here")
    return found


def _about(file: Path, metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    if name not in metadata:
        raise CheckpointError(f"{file}: its metadata says nothing of {name}")
    about = parse_json(metadata[name].encode(), f"{file}: metadata of {name}")
    if not isinstance(about, dict):
        raise CheckpointError(f"{file}: metadata of {name}: {short(about)} is not an object")
    return about


def _bits(codes: Any, kind: str, data: Mapping[str, Any]) -> int:
    if kind == "Int8Tensor":
        return 8
    said = data.get("target_dtype")
    match = WIDTH.fullmatch(str(said.get("_data"))) if isinstance(said, dict) else None
    if match is None:
        raise CheckpointError(f"{codes}: target_dtype={short(said)} is no int1 to int8")
    return int(match[1])
