"""The formats that are imported: how each is known, and its reader. A format is one row and one file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import CheckpointError
from ..files.strict import close_names, short
from . import awq, compressed, gguf, gptq, hqq, mlx, mxfp4, quanto, torchao
from .stored import Stored
from .weight import Found

AUTO = "auto"


@dataclass(frozen=True)
class Format:
    """recognises: whether a checkpoint is of it, by its config and the shapes of its tensors."""

    summary: str
    recognises: Callable[[Stored], bool]
    read: Callable[[Stored], Found]


FORMATS: dict[str, Format] = {
    "gptq": Format("GPTQ v1, v2 and planar, 2 to 8 bits", gptq.is_gptq, gptq.read_gptq),
    "auto-round": Format("auto-round's own and gptq exports", gptq.is_auto_round, gptq.read_auto_round),
    "efficientqat": Format("EfficientQAT", gptq.is_efficient_qat, gptq.read_efficient_qat),
    "compressed-tensors": Format(
        "compressed-tensors, integers of 1 to 8 bits", compressed.is_compressed, compressed.read_compressed
    ),
    "hqq": Format("HQQ with axis=1", hqq.is_hqq, hqq.read_hqq),
    "torchao": Format("torchao, int8 and int1 to int8", torchao.is_torchao, torchao.read_torchao),
    "quanto": Format("optimum-quanto, qint8", quanto.is_quanto, quanto.read_quanto),
    "mlx": Format("MLX, affine, 2, 3, 4, 5, 6 and 8 bits", mlx.is_mlx, mlx.read_mlx),
    "gguf": Format("GGUF: legacy and K types, MXFP4", gguf.is_gguf, gguf.read_gguf),
    "mxfp4": Format("MXFP4 experts of gpt-oss", mxfp4.is_mxfp4, mxfp4.read_mxfp4),
    "awq": Format("AWQ, 4 bits, gemm and gemv", awq.is_awq, awq.read_awq),
}

# Methods that are known and not imported, and what to do.
DENSE_SOURCE = "`mpq pack` reads it as a dense model, and quantizes it"
REFUSED = {
    "mpq": "it is packed already",
    "fp8": DENSE_SOURCE,
    "bitsandbytes": "its int8 weights are two products in fp32, and its 4 bits name values of a table: neither is a "
    "code times a scale; dequantize it in transformers, and pack that",
    "exl2": "its scales are products of numbers of 4 bits and others; import a GPTQ or GGUF of the model",
    "exl3": "its codes walk through a trellis; import a GPTQ or GGUF of the model",
    "aqlm": "its codes name vectors; import a GPTQ or GGUF of the model",
    "vptq": "its codes name vectors; import a GPTQ or GGUF of the model",
    "quip": "its codes name vectors of a lattice; import a GPTQ or GGUF of the model",
    "spqr": "it keeps single weights apart in 16 bits; import a GPTQ or GGUF of the model",
    "higgs": "its codes name vectors, of weights that were rotated; import a GPTQ or GGUF of the model",
    "quark": "AMD Quark's own packing is not read; export to compressed-tensors",
    "modelopt": "ModelOpt's packing runs along N and is not read; export to compressed-tensors",
}


def find_format(stored: Stored, name: str = AUTO) -> str:
    """The name of the format of a checkpoint. Raises CheckpointError for an unknown one, and for none or several."""
    if name != AUTO:
        if name not in FORMATS:
            raise CheckpointError(f"{short(name)} is not a known format{close_names(name, [*FORMATS])}")
        return name
    if stored.method in REFUSED:
        raise CheckpointError(f"{stored.where('quant_method')}={stored.method!r}: {REFUSED[stored.method]}")
    found = [key for key, form in FORMATS.items() if form.recognises(stored)]
    if len(found) == 1:
        return found[0]
    why = f"could be {' or '.join(found)}" if found else f"is none of {', '.join(FORMATS)}"
    said = f"quant_method={stored.method!r}" if stored.method else "has no quantization_config"
    raise CheckpointError(f"{stored.path}: {why} ({said}); say which with --from (format=)")
