"""AWQ: the layouts of AutoAWQ that are called gemm and gemv, of 4 bits; and gemm of 5, 6 and 7 bits, by auto-round.

    gemm   qweight int32 [K, N * bits / 32]   qzeros int32 [groups, N * bits / 32]   scales [groups, N]
    gemv   qweight int32 [N, K / 8]           qzeros int32 [N, w]                    scales [N, 8 w]

    W[n, k] = (code - zero) * scale

gemm: a row of words is a stream (words.py) of codes, in which the rows of W have the order 0 2 4 6 1 3 5 7 of each
eight. gemv: codes are in their own order; w are groups, rounded up, and what is behind them is not used. Source:
autoawq 0.2.9 (awq.utils.packing_utils, awq.modules.linear.gemv), auto-round 0.16.1 (export.export_to_awq).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import CheckpointError
from ..files.shards import StoredTensor, TensorFiles
from ..files.strict import short
from ..format.weights import QuantizedWeight
from .columns import Columns
from .gptq import group_size
from .stored import FLOATS, Stored, check_matrix
from .weight import ForeignWeight, Found
from .words import unpack

BITS = (4, 5, 6, 7)
HELD = 8  # codes of 4 bits in a word
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which of eight codes is that of row 0, 1, ..., 7
VERSIONS = {"gemm": "gemm", "exllama": "gemm", "ipex": "gemm", "gemv": "gemv"}
OTHERS = {
    "gemv_fast": "its words are in the order of a kernel; import the gemm checkpoint that it was made of",
    "llm-awq": "its words are in the order of a kernel; import the gemm checkpoint that it was made of",
    "marlin": "its words are in the order of Marlin's kernel; import the gemm checkpoint that it was made of",
}


@dataclass(frozen=True)
class Module:
    """The tensors of one weight."""

    name: str
    qweight: StoredTensor
    qzeros: StoredTensor
    scales: StoredTensor
    rows: int
    bits: int
    columns: Columns

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """All stored tensors."""
        return (self.qweight, self.qzeros, self.scales)


def is_awq(stored: Stored) -> bool:
    """Whether a config names AWQ, as its method or as the packing of auto-round."""
    packing = str(stored.quantization.get("packing_format", ""))
    unnamed = not stored.method and "w_bit" in stored.quantization
    return (
        unnamed or stored.method == "awq" or (stored.method in ("auto-round", "intel/auto-round") and "awq" in packing)
    )


def read_awq(stored: Stored) -> Found:
    """Every quantized weight. Raises CheckpointError."""
    config = stored.quantization
    version = str(config.get("version") or config.get("format") or config.get("checkpoint_format") or "gemm").lower()
    version = "llm-awq" if config.get("backend") == "llm-awq" else version
    if version in OTHERS:
        raise CheckpointError(f"{stored.where('version')}={version!r}: {OTHERS[version]}")
    if version not in VERSIONS:
        raise CheckpointError(f"{stored.where('version')}={short(version)} is not one of {', '.join(VERSIONS)}")
    form, found = VERSIONS[version], Found()
    find, read = FORMS[form]
    for name, qweight in stored.modules("qweight"):
        module = find(stored, name, qweight)
        zeros = read[1](stored.files, module)
        middle = bool((zeros == 1 << (module.bits - 1)).all())
        stored.files.release(module.qzeros.name)
        layout = module.columns.layout(module.rows, module.bits, "none" if middle else "int", module.scales.dtype)
        says = (
            f"awq {form}, {module.bits} bits, {module.columns.in_words()}, {'symmetric' if middle else 'zero points'}"
        )
        make = partial(_make, module, read, middle)
        found.add(ForeignWeight(name, module.parts, module.columns, layout, says, make))
    if not found.weights:
        raise CheckpointError(f"{stored.path}: no file holds a qweight; nothing is quantized in the form of AWQ")
    return found


def _find_gemm(stored: Stored, name: str, qweight: StoredTensor) -> Module:
    qzeros, scales = stored.part(name, "qzeros"), stored.part(name, "scales")
    cols, words = check_matrix(qweight, (torch.int32,), "AWQ's codes")
    groups, rows = check_matrix(scales, FLOATS, "AWQ's scales")
    fits = check_matrix(qzeros, (torch.int32,), "AWQ's zeros") == (groups, words) and rows % HELD == 0
    size, bits = _group_size(stored, cols, groups), next((b for b in BITS if 32 * words == b * rows), 0)
    if not fits or size is None or not bits:
        raise CheckpointError(
            f"{qweight}: with {qzeros} and {scales}, these are no words of AWQ's gemm layout of 4 to 7 bits"
        )
    return Module(name, qweight, qzeros, scales, rows, bits, Columns.uniform(cols, size, str(qweight)))


def _find_gemv(stored: Stored, name: str, qweight: StoredTensor) -> Module:
    qzeros, scales = stored.part(name, "qzeros"), stored.part(name, "scales")
    rows, words = check_matrix(qweight, (torch.int32,), "AWQ's codes")
    cols, size = HELD * words, stored.quantization.get("group_size", stored.quantization.get("q_group_size", 128))
    size = cols if size == -1 else size
    held = check_matrix(qzeros, (torch.int32,), "AWQ's zeros")
    fits = check_matrix(scales, FLOATS, "AWQ's scales") == (rows, HELD * held[1]) and held[0] == rows
    if not fits or type(size) is not int or size < 1 or cols % size or cols // size > HELD * held[1]:
        raise CheckpointError(f"{qweight}: with {qzeros} and {scales}, these are no words of AWQ's gemv layout")
    return Module(name, qweight, qzeros, scales, rows, 4, Columns.uniform(cols, size, str(qweight)))


def _group_size(stored: Stored, cols: int, groups: int) -> int | None:
    said = stored.quantization.get("group_size", stored.quantization.get("q_group_size"))
    return group_size(said, cols, groups) if groups <= cols else None


def _make(module: Module, read: Readers, middle: bool, files: TensorFiles) -> QuantizedWeight:
    codes, zeros, scales = (each(files, module) for each in read)
    return module.columns.weight(module.bits, codes, scales, None if middle else zeros)


def _gemm(words: torch.Tensor, module: Module) -> torch.Tensor:
    """uint8 [N, k] from words [k, N * bits / 32]."""
    codes = unpack(words.T.contiguous(), module.bits, module.rows)
    return codes.view(-1, HELD, words.shape[0])[:, list(ORDER)].reshape(-1, words.shape[0])


def _gemv(words: torch.Tensor, count: int) -> torch.Tensor:
    """uint8 [N, count] from words [N, ...]."""
    return unpack(words.T.contiguous(), 4, count).T.contiguous()


Reader = Callable[[TensorFiles, Module], torch.Tensor]
Readers = tuple[Reader, Reader, Reader]  # codes [N, K], zeros [N, groups], scales [N, groups]
FORMS: dict[str, tuple[Callable[[Stored, str, StoredTensor], Module], Readers]] = {
    "gemm": (
        _find_gemm,
        (
            lambda files, module: _gemm(files.read(module.qweight.name), module),
            lambda files, module: _gemm(files.read(module.qzeros.name), module),
            lambda files, module: files.read(module.scales.name).T,
        ),
    ),
    "gemv": (
        _find_gemv,
        (
            lambda files, module: _gemv(files.read(module.qweight.name), module.columns.runs[-1].k1),
            lambda files, module: _gemv(files.read(module.qzeros.name), len(module.columns.groups)),
            lambda files, module: files.read(module.scales.name)[:, : len(module.columns.groups)],
        ),
    ),
}
