"""GGUF: the legacy and K types of ggml, and MXFP4. Blocks of 32 or 256 weights along K.

    Q4_0 Q5_0 Q8_0        (code - half) * d                   d fp16, groups of 32
    Q4_1 Q5_1             code * d + m                        d, m fp16, groups of 32
    Q2_K Q4_K Q5_K        code * (d * sc) - dmin * mn         sc, mn of 4 or 6 bits for each 16 or 32 weights
    Q3_K Q6_K             (code - half) * (d * sc)            sc of 6 or 8 bits for each 16 weights
    MXFP4                 a multiple of 1/2 in -6..6 * 2^e    as codes of 5 bits: twice the number, + 16

d * sc is exact in fp32 and not in fp16, so the K types get scales in fp32, which takes more bytes than the file has.
gguf-py's `dequantize` computes in fp32, and what is imported is that, bit for bit. In files of the architecture llama
the rows of queries and keys are in pairs that rotate together; they are put back into transformers' order, with the
numbers of heads in config.json. Source: gguf 0.19 (gguf.quants), ggml (convert_hf_to_gguf, LlamaModel.permute).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import CheckpointError
from ..files.shards import StoredTensor, TensorFiles
from ..format.weights import QuantizedWeight
from .columns import Columns
from .gguf_file import BlockType, GgufFiles
from .stored import Stored
from .weight import ForeignWeight, Found

SUPER = 256


@dataclass(frozen=True)
class Decoded:
    """Of blocks [n, bytes]: codes [n, block], scales and mins [n, groups of a block]."""

    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None = None


@dataclass(frozen=True)
class Type:
    """bits, group: of ours. zero: "none" or "min". scale_dtype: of ours. decode: blocks -> Decoded."""

    bits: int
    group: int
    zero: str
    scale_dtype: torch.dtype
    decode: Callable[[torch.Tensor], Decoded]


def is_gguf(stored: Stored) -> bool:
    """Whether the tensors are those of a GGUF file."""
    return isinstance(stored.files, GgufFiles)


def read_gguf(stored: Stored) -> Found:
    """Every quantized weight. Raises CheckpointError."""
    files, found = stored.files, Found()
    if not isinstance(files, GgufFiles):
        raise CheckpointError(f"{stored.path}: holds no .gguf file")
    for name, tensor in files.tensors.items():
        form = files.types[name]
        order = _row_order(stored, files.architecture, name, tensor)
        if form.dtype != "U8":
            if order is not None:
                raise CheckpointError(f"{tensor}: its rows are in ggml's order, and it is not quantized")
            continue
        found.add(_weight(name, tensor, form, order))
    found.used.update(files.dropped)
    if files.dropped:
        found.notes.append(f"left out, since config.json has it: {', '.join(files.dropped)}")
    return found


def _weight(name: str, tensor: StoredTensor, form: BlockType, order: torch.Tensor | None) -> ForeignWeight:
    if len(tensor.shape) != 2:
        raise CheckpointError(f"{tensor}: is no matrix")
    kind = KINDS[form.name]
    rows, cols = tensor.shape[0], tensor.shape[1] // form.size * form.block
    columns = Columns.uniform(cols, kind.group, str(tensor))
    layout = columns.layout(rows, kind.bits, kind.zero, kind.scale_dtype)
    make = partial(_make, tensor, form, kind, columns, order)
    says = f"gguf {form.name}, {kind.bits} bits, {columns.in_words()}"
    return ForeignWeight(name.removesuffix(".weight"), (tensor,), columns, layout, says, make)


def _row_order(stored: Stored, architecture: str, name: str, tensor: StoredTensor) -> torch.Tensor | None:
    """For queries and keys of llama: row j of transformers is row order[j] of the file."""
    module, _, leaf = name.rpartition(".")
    heads_of = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = heads_of.get(module.rpartition(".")[2])
    if architecture != "llama" or key is None:
        return None
    heads = stored.config.get(key, stored.config.get("num_attention_heads"))
    rows = tensor.shape[0]
    if type(heads) is not int or heads < 1 or rows % (2 * heads):
        raise CheckpointError(f"{tensor}: {key}={heads!r} in config.json does not share out its {rows} rows")
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


def _make(
    tensor: StoredTensor,
    form: BlockType,
    kind: Type,
    columns: Columns,
    order: torch.Tensor | None,
    files: TensorFiles,
) -> QuantizedWeight:
    blocks = files.read(tensor.name)
    if order is not None:
        blocks = blocks[order]
    rows = len(blocks)
    made = kind.decode(blocks.reshape(-1, form.size))
    mins = None if made.mins is None else made.mins.reshape(rows, -1)
    codes, scales = made.codes.reshape(rows, -1), made.scales.reshape(rows, -1)
    return columns.weight(kind.bits, codes, scales, mins, kind.zero)


def _half(blocks: torch.Tensor, place: int) -> torch.Tensor:
    """fp16 [n, 1] at a byte of every block."""
    return blocks[:, place : place + 2].contiguous().view(torch.float16)


def _shifted(packed: torch.Tensor, span: int, bits: int) -> torch.Tensor:
    """Fields of `bits` of runs of `span` bytes, a run's lowest fields first: [n, bytes] -> [n, bytes * 8 / bits]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(-1, 1)
    runs = packed.reshape(len(packed), -1, 1, span)
    return ((runs >> shifts) & ((1 << bits) - 1)).reshape(len(packed), -1)


def _bits_of(packed: torch.Tensor) -> torch.Tensor:
    """Bit j of 4 bytes is that of weight j: [n, 4] -> [n, 32]."""
    return ((packed[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(len(packed), -1)


def _q4_0(blocks: torch.Tensor) -> Decoded:
    return Decoded(_shifted(blocks[:, 2:], 16, 4), _half(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> Decoded:
    return Decoded(_shifted(blocks[:, 4:], 16, 4), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> Decoded:
    return Decoded(_shifted(blocks[:, 6:], 16, 4) | (_bits_of(blocks[:, 2:6]) << 4), _half(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> Decoded:
    codes = _shifted(blocks[:, 8:], 16, 4) | (_bits_of(blocks[:, 4:8]) << 4)
    return Decoded(codes, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> Decoded:
    return Decoded(blocks[:, 2:] ^ 128, _half(blocks, 0))  # + 128, of a signed byte


def _q2_k(blocks: torch.Tensor) -> Decoded:
    scales, codes = blocks[:, :16], _shifted(blocks[:, 16:80], 32, 2)
    d, dmin = _half(blocks, 80).float(), _half(blocks, 82).float()
    return Decoded(codes, d * (scales & 15).float(), -(dmin * (scales >> 4).float()))


def _q3_k(blocks: torch.Tensor) -> Decoded:
    high, low, packed = _shifted(blocks[:, :32], 32, 1), _shifted(blocks[:, 32:96], 32, 2), blocks[:, 96:108]
    scales = _shifted(packed[:, :8], 8, 4) | (_shifted(packed[:, 8:], 4, 2) << 4)
    return Decoded(low | (high << 2), _half(blocks, 108).float() * (scales.float() - 32))


def _scales_and_mins(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight of 6 bits each, of 12 bytes, in fp32."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], dim=1)
    mins = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], dim=1)
    return scales.float(), mins.float()


def _q4_k(blocks: torch.Tensor) -> Decoded:
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    d, dmin = _half(blocks, 0).float(), _half(blocks, 2).float()
    return Decoded(_shifted(blocks[:, 16:], 32, 4), d * scales, -(dmin * mins))


def _q5_k(blocks: torch.Tensor) -> Decoded:
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    d, dmin = _half(blocks, 0).float(), _half(blocks, 2).float()
    codes = _shifted(blocks[:, 48:], 32, 4) | (_shifted(blocks[:, 16:48], 32, 1) << 4)
    return Decoded(codes, d * scales, -(dmin * mins))


def _q6_k(blocks: torch.Tensor) -> Decoded:
    codes = _shifted(blocks[:, :128], 64, 4) | (_shifted(blocks[:, 128:192], 32, 2) << 4)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return Decoded(codes, _half(blocks, 208).float() * scales)


E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)  # twice the numbers of the type; the fourth bit is the sign


def _mxfp4(blocks: torch.Tensor) -> Decoded:
    numbers = torch.tensor([16 + value for value in E2M1] + [16 - value for value in E2M1], dtype=torch.uint8)
    codes = numbers[_shifted(blocks[:, 1:], 16, 4).long()]
    return Decoded(codes, torch.ldexp(torch.ones(len(blocks), 1), blocks[:, :1].to(torch.int32) - 128))


F16, F32 = torch.float16, torch.float32
KINDS = {
    "Q4_0": Type(4, 32, "none", F16, _q4_0),
    "Q4_1": Type(4, 32, "min", F16, _q4_1),
    "Q5_0": Type(5, 32, "none", F16, _q5_0),
    "Q5_1": Type(5, 32, "min", F16, _q5_1),
    "Q8_0": Type(8, 32, "none", F16, _q8_0),
    "Q2_K": Type(2, 16, "min", F32, _q2_k),
    "Q3_K": Type(3, 16, "none", F32, _q3_k),
    "Q4_K": Type(4, 32, "min", F32, _q4_k),
    "Q5_K": Type(5, 32, "min", F32, _q5_k),
    "Q6_K": Type(6, 16, "none", F32, _q6_k),
    "MXFP4": Type(5, 32, "none", F32, _mxfp4),
}
