"""MXFP4 experts as gpt-oss stores them: 4-bit floats with one exponent for each 32 weights of a row.

    <experts>.<name>_blocks U8 [E, N, K / 32, 16], two numbers in a byte, the lower four bits first
    <experts>.<name>_scales U8 [E, N, K / 32]                                 W = number * 2^(scale - 127)

A number is a multiple of 1/2 in -6..6, so it is a code of 5 bits, twice the number + 16, with the scale
2^(scale - 128). Both are exact. An expert's gate and up are rows of one tensor, every other one each; which rows, the
model says. Source: transformers (integrations.mxfp4, convert_moe_packed_tensors).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ..dense.checkpoint import CONFIG_FILE
from ..dense.decoded import DecodedTensor, decoded_tensors
from ..dense.linears import LinearSpec
from ..errors import CheckpointError
from ..files.shards import TensorFiles
from ..format.weights import QuantizedWeight
from .columns import Columns
from .gguf import E2M1
from .stored import Stored
from .weight import ForeignWeight, Found

BITS, GROUP = 5, 32


def is_mxfp4(stored: Stored) -> bool:
    """Whether a config is one of MXFP4."""
    return stored.method == "mxfp4"


def read_mxfp4(stored: Stored) -> Found:
    """Every quantized tensor. Raises CheckpointError."""
    found = Found()
    said = {"quantization_config": stored.quantization}
    for name, tensor in decoded_tensors(stored.path / CONFIG_FILE, said, stored.files, torch.bfloat16).items():
        if isinstance(tensor, DecodedTensor):
            found.experts[name] = partial(_weight, tensor)
            found.tensors[name] = tensor
            found.used.update(part.name for part in tensor.parts)
    return found


def _weight(tensor: DecodedTensor, spec: LinearSpec) -> ForeignWeight:
    """Of one linear of one expert."""
    cut = None if spec.expert is None else spec.expert.cut
    if cut is None or not cut.transposed or spec.origin is not None:
        raise CheckpointError(
            f"{tensor.parts[0]}: transformers makes {spec.name} of it in a way that is not known here"
        )
    place, rows = cut.index, slice(cut.start, cut.stop, cut.step)

    def pieces(files: TensorFiles) -> Iterator[torch.Tensor]:
        for part in tensor.parts:
            yield files.read(part.name)[place, rows].contiguous()

    columns = Columns.uniform(spec.in_features, GROUP, str(tensor))
    layout = columns.layout(spec.out_features, BITS, "none", torch.float32)
    says = f"mxfp4, {BITS} bits, {columns.in_words()}"

    def make(files: TensorFiles) -> QuantizedWeight:
        blocks, exponents = pieces(files)
        numbers = torch.tensor([16 + value for value in E2M1] + [16 - value for value in E2M1], dtype=torch.uint8)
        pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).view(len(blocks), -1)
        scales = torch.ldexp(torch.ones(exponents.shape), exponents.to(torch.int32) - 128)
        return columns.weight(BITS, numbers[pairs.long()], scales, None)

    return ForeignWeight(spec.name, tensor.parts, columns, layout, says, make, pieces)
