"""A packed directory as ONNX models, one file for each packed module."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import onnx

from ..checkpoint.packed import PackedCheckpoint
from ..errors import CheckpointError, UnsupportedError
from .graph import export_module

INLINE_BYTES = 1 << 30  # protobuf holds 2 GiB; larger weights go to a file beside the model


@dataclass(frozen=True)
class Exported:
    """What became of a packed module: its file and the operators in it, or why there is none."""

    module: str
    file: str | None
    operators: tuple[str, ...] = ()
    reason: str | None = None


def export_directory(
    packed_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    operators: str = "auto",
    dtype: str = "float32",
    activations: str = "exact",
) -> list[Exported]:
    """Write <module>.onnx for every packed linear, fused linear and embedding of a packed directory.

    Experts of a mixture are not exported; nor are tensors that were not packed. What each file holds: `export_module`.
    Raises CheckpointError when `out_dir` exists or `packed_dir` is no packed directory, UnsupportedError for a module
    that operators="nbits" cannot hold exactly; nothing is left behind then.
    """
    checkpoint, target = PackedCheckpoint.open(packed_dir), Path(out_dir)
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: exists already; choose another place")
    target.mkdir(parents=True)
    try:
        return [_export(checkpoint, name, target, operators, dtype, activations) for name in checkpoint.modules]
    except BaseException:
        for file in target.iterdir():
            file.unlink()
        target.rmdir()
        raise


def _export(
    checkpoint: PackedCheckpoint, name: str, target: Path, operators: str, dtype: str, activations: str
) -> Exported:
    module = checkpoint.modules[name]
    if module.experts is not None:
        return Exported(name, None, reason="experts: no operator of ONNX chooses rows of x for each of them")
    weight, bias = checkpoint.weight(name), checkpoint.bias(name)
    try:
        model = export_module(weight, bias, operators, dtype, activations, module.embedding is not None)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from error
    file = target / f"{name}.onnx"
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > INLINE_BYTES
    onnx.save(model, str(file), save_as_external_data=large, location=f"{file.name}.data")
    checkpoint.release(name)
    kinds = {"MatMulNBits", "Linear", "Embedding"}
    return Exported(name, file.name, tuple(sorted({node.op_type for node in model.graph.node} & kinds)))
