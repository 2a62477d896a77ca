"""A GGUF file's header, distrusted, and its tensors under the names that transformers has for them.

    "GGUF" | u32 version | u64 tensors | u64 values | values: name, type, value
           | tensors: name, dimensions, type, offset | padding | data, each tensor at a multiple of the alignment

Dimensions are innermost first. The experts of a layer are one tensor, and each is a piece of it, so that each has an
entry of its own. What a name means depends on the architecture: ARCHITECTURES lists those that are known.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError
from ..files.safetensors import TensorEntry
from ..files.shards import StoredTensor, TensorFiles
from ..files.strict import contained_file, short

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_TEXT = 2**24  # bytes of one text; a chat template takes some 10,000
MAX_COUNT = 2**24  # tensors, values, elements of a list: a vocabulary has up to 300,000
MAX_DEPTH = 4
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a value -> bytes
TEXT, LIST, UINT32 = 8, 9, 4


@dataclass(frozen=True)
class BlockType:
    """block: weights in a block. size: its bytes. dtype: of safetensors, for tensors that are not quantized."""

    name: str
    block: int
    size: int
    dtype: str = "U8"


TYPES = {
    0: BlockType("F32", 1, 4, "F32"),
    1: BlockType("F16", 1, 2, "F16"),
    30: BlockType("BF16", 1, 2, "BF16"),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    39: BlockType("MXFP4", 32, 17),
}
OTHER_TYPES = {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S"}
OTHER_TYPES |= {23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4"}

MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
PHI3 = BLOCK | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
# Architecture -> names in a block. llama's queries and keys are in another order of rows; gguf.py has it.
ARCHITECTURES: dict[str, Mapping[str, str]] = {
    "llama": BLOCK | MIXTRAL_EXPERTS,
    "qwen2": BLOCK,
    "qwen3": BLOCK,
    "qwen3moe": BLOCK | QWEN_EXPERTS,
    "phi3": PHI3,
}
NAME = re.compile(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)")
COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # config.json has them


@dataclass(frozen=True)
class GgufHeader:
    """architecture: of the model. tensors: by transformers' name. types: of each. dropped: that config.json has."""

    architecture: str
    tensors: dict[str, TensorEntry]
    types: dict[str, BlockType]
    dropped: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class GgufFiles(TensorFiles):
    """The tensors of GGUF files as TensorFiles has those of safetensors; blocks are U8 [N, bytes of a row]."""

    architecture: str = ""
    types: dict[str, BlockType] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @classmethod
    def open_gguf(cls, directory: Path) -> GgufFiles:
        """All .gguf files of a directory. Raises CheckpointError."""
        names = sorted(path.name for path in directory.iterdir() if path.name.lower().endswith(".gguf"))
        names = [name for name in names if not name.lower().startswith("mmproj")]
        files = tuple(contained_file(directory, name) for name in names)
        tensors: dict[str, StoredTensor] = {}
        types: dict[str, BlockType] = {}
        headers = [read_gguf_header(file) for file in files]
        for file, header in zip(files, headers, strict=True):
            for name, entry in header.tensors.items():
                if name in tensors:
                    raise CheckpointError(f"{file}: {short(name)} is also in {tensors[name].file}; keep one")
                tensors[name] = StoredTensor(name, file, entry)
            types |= header.types
        dropped = tuple(name for header in headers for name in header.dropped)
        return cls(tensors, files, architecture=headers[0].architecture, types=types, dropped=dropped)

    def _entries(self, file: Path) -> Mapping[str, TensorEntry]:
        return read_gguf_header(file).tensors


def has_gguf(directory: Path) -> bool:
    """Whether a directory holds a GGUF file and no safetensors."""
    names = [path.name.lower() for path in directory.iterdir()]
    return any(name.endswith(".gguf") for name in names) and not any(name.endswith(".safetensors") for name in names)


def read_gguf_header(path: Path) -> GgufHeader:
    """Everything before the data. Raises CheckpointError for whatever is out of bounds."""
    try:
        with open(path, "rb") as file:
            return _Reader(path, file, path.stat().st_size).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


class _Reader:
    """A file that is read forward, never behind its end."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def fail(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {text}; the file is damaged, or none of GGUF")

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size else b""
        if len(data) != count:
            raise self.fail("ends inside its header")
        return data

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0])

    def count(self, what: str) -> int:
        value = self.number("Q")
        if value > MAX_COUNT:
            raise self.fail(f"{value} {what}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        if length > MAX_TEXT:
            raise self.fail(f"a text of {length} bytes")
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> object:
        """A text or a uint32; anything else is passed over and None."""
        if kind == TEXT:
            return self.text()
        if kind == UINT32:
            return self.number("I")
        if kind in SCALARS:
            self.take(SCALARS[kind])
            return None
        if kind != LIST or depth > MAX_DEPTH:
            raise self.fail(f"a value of type {kind}")
        inner, length = self.number("I"), self.count("values in a list")
        if inner in SCALARS:
            self.take(SCALARS[inner] * length)
        else:
            for _ in range(length):
                self.value(inner, depth + 1)
        return None

    def header(self) -> GgufHeader:
        """All that stands before the data. Raises the error of `fail` for what is no header."""
        if self.take(4) != MAGIC or self.number("I") not in VERSIONS:
            raise self.fail(f"does not begin as GGUF of versions {VERSIONS}")
        tensors, values = self.count("tensors"), self.count("values")
        known = {}
        for _ in range(values):
            name, kind = self.text(), self.number("I")
            known[name] = self.value(kind)
        architecture, alignment = known.get("general.architecture"), known.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.fail(f"an alignment of {short(alignment)}")
        infos = [self._info() for _ in range(tensors)]
        start = -(-self.file.tell() // alignment) * alignment
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{self.path}: its architecture is {short(architecture)}, and names and orders are known of "
                f"{', '.join(ARCHITECTURES)} alone"
            )
        out: dict[str, TensorEntry] = {}
        types: dict[str, BlockType] = {}
        for name, dims, form, offset in infos:
            if name in COMPUTED:
                continue
            for target, entry in self._entries(architecture, name, dims, form, start + offset):
                if target in out:
                    raise self.fail(f"tensor {short(target)} appears twice")
                out[target], types[target] = entry, form
        return GgufHeader(architecture, out, types, tuple(name for name, *_ in infos if name in COMPUTED))

    def _info(self) -> tuple[str, tuple[int, ...], BlockType, int]:
        name, rank = self.text(), self.number("I")
        if not 0 < rank <= 4:
            raise self.fail(f"tensor {short(name)} of {rank} dimensions")
        dims = tuple(self.number("Q") for _ in range(rank))
        kind, offset = self.number("I"), self.number("Q")
        if kind in OTHER_TYPES:
            raise CheckpointError(
                f"{self.path}: {short(name)} is {OTHER_TYPES[kind]}: its codes are entries of a table, or have more "
                "than one scale; such a weight cannot be had without quantizing it again"
            )
        if kind not in TYPES:
            raise self.fail(f"tensor {short(name)} of type {kind}")
        form = TYPES[kind]
        if 0 in dims or dims[0] % form.block or math.prod(dims) > 2**59:
            raise self.fail(f"tensor {short(name)}: {list(dims)} are no blocks of {form.name}")
        return name, dims, form, offset

    def _entries(
        self, architecture: str, name: str, dims: tuple[int, ...], form: BlockType, start: int
    ) -> Iterator[tuple[str, TensorEntry]]:
        """(name in transformers, entry): one, or one for each expert."""
        match = NAME.fullmatch(name)
        table = MODEL if match is not None and match[1] is None else ARCHITECTURES[architecture]
        target = None if match is None else table.get(match[2])
        experts = target is not None and "{}" in target
        if match is None or target is None or len(dims) != (3 if experts else len(dims[:2])):
            raise CheckpointError(f"{self.path}: {short(name)} {list(dims)} is not known of a model of {architecture}")
        lead = "" if match[1] is None else f"model.layers.{match[1]}."
        row = dims[0] // form.block * form.size
        shape = (*dims[1:2], row if form.dtype == "U8" else dims[0])
        size = row * math.prod(dims[1:2])
        for index in range(dims[2] if experts else 1):
            begin = start + index * size
            if begin + size > self.size:
                raise self.fail(f"tensor {short(name)} ends at byte {begin + size} of {self.size}")
            yield f"{lead}{target.format(index)}.{match[3]}", TensorEntry(form.dtype, shape, begin, begin + size)
