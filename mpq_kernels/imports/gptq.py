"""GPTQ: AutoGPTQ, GPTQModel, auto-round's exports and EfficientQAT, which differ in their zeros and in 3, 5, 6, 7 bits.

    qweight int32 [K * bits / 32, N]   qzeros int32 [groups, N * bits / 32]   scales [groups, N]   g_idx int32 [K]

    W[n, k] = (code - zero) * scale[g_idx[k], n]

    written by           zeros in the file                         3 bits   5, 6, 7 bits
    gptq (v1)            zero - 1: 1 is added to the packed words  stream   -
    gptq_v2              zero                                      stream   -
    gptq_p               zero                                      planar   planar
    auto-round, gptq     zero - 1: 1 is added to each              stream   stream
    auto-round, own      zero                                      stream   stream
    EfficientQAT         zero                                      fields   -

Widths, groups and symmetry are those of the tensors, module by module, and not what the config says of them. Which
zeros are in the file is what the config says, unless the zeros of the symmetric weights say otherwise: those are
2^(bits-1), less 1 in v1. The packings are those of words.py.

Source: GPTQModel 7.7 (utils.model_dequant, utils.planar_packing), auto-round 0.16.1 (auto_round_extension.torch),
https://github.com/OpenGVLab/EfficientQAT (quantize.int_linear_real).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.shards import StoredTensor, TensorFiles
from ..files.strict import short
from ..format.weights import QuantizedWeight
from .columns import Columns
from .stored import FLOATS, Stored, check_matrix
from .weight import ForeignWeight, Found
from .words import unpack, words_for

BITS = range(2, 9)
WIDE = (5, 6, 7)
FORMATS = ("gptq", "gptq_v2", "gptq_p")
OTHERS = {
    "marlin": "its words are in the order of Marlin's kernel; import the GPTQ checkpoint that it was made of",
    "bitblas": "its words are in the order of BitBLAS; import the GPTQ checkpoint that it was made of",
}
WORD_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # 1 in every field


@dataclass(frozen=True)
class Rules:
    """How a program writes. offset: what is added to stored zeros. carries: to the words, so that a field of
    all ones carries over.
    """

    name: str
    offset: int
    carries: bool
    three: str  # packing of 3 bits
    wide: str | None  # packing of 5, 6 and 7 bits, None where there are none


V1 = Rules("gptq", 1, True, "stream", None)
V2 = Rules("gptq v2", 0, True, "stream", None)
PLANAR = Rules("gptq planar", 0, True, "planar", "planar")
AUTO_ROUND_GPTQ = Rules("auto-round, gptq", 1, False, "stream", "stream")
AUTO_ROUND = Rules("auto-round", 0, False, "stream", "stream")
EFFICIENT_QAT = Rules("EfficientQAT", 0, False, "fields", None)
LABELS = {"gptq": V1, "gptq_v2": V2, "gptq_p": PLANAR}


@dataclass(frozen=True)
class Module:
    """The tensors of one weight, and what their shapes say. uniform: the one value of all its stored zeros, or None."""

    name: str
    qweight: StoredTensor
    qzeros: StoredTensor
    scales: StoredTensor
    g_idx: StoredTensor | None
    rows: int  # N
    cols: int  # K
    bits: int
    packing: str
    uniform: int | None = None

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """All stored tensors."""
        held = (self.qweight, self.qzeros, self.scales, self.g_idx)
        return tuple(part for part in held if part is not None)


def is_gptq(stored: Stored) -> bool:
    """Whether a checkpoint is one of GPTQ: its config says so, or it says nothing and the tensors have its shapes."""
    return stored.method in ("gptq", "marlin") or (not stored.method and bool(stored.quantization) and _shaped(stored))


def is_auto_round(stored: Stored) -> bool:
    """Whether auto-round wrote a checkpoint, with words of GPTQ."""
    packing = str(stored.quantization.get("packing_format", ""))
    named = stored.method in ("auto-round", "intel/auto-round")
    return named and "awq" not in packing and "llm_compressor" not in packing


def is_efficient_qat(stored: Stored) -> bool:
    """Whether a checkpoint has GPTQ's tensors and no config of its quantization, as EfficientQAT writes it."""
    return not stored.quantization and _shaped(stored)


def _shaped(stored: Stored) -> bool:
    found = next(stored.modules("qweight"), None)
    if found is None:
        return False
    module, qweight = found
    scales, g_idx = stored.optional(module, "scales"), stored.optional(module, "g_idx")
    return g_idx is not None and scales is not None and qweight.shape[-1:] == scales.shape[-1:]


def read_gptq(stored: Stored) -> Found:
    """Every quantized weight. Raises CheckpointError."""
    config = stored.quantization
    label = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    label = "marlin" if config.get("is_marlin_format") is True or stored.method == "marlin" else label
    if label in OTHERS:
        raise CheckpointError(f"{stored.where('checkpoint_format')}={label!r}: {OTHERS[label]}")
    if label not in LABELS:
        raise CheckpointError(f"{stored.where('checkpoint_format')}={short(label)} is not one of {', '.join(FORMATS)}")
    modules = _modules(stored, replace(LABELS[label], wide="planar"))
    rules = PLANAR if any(module.bits in WIDE for module in modules) else LABELS[label]
    return _read(stored, rules, modules)


def read_auto_round(stored: Stored) -> Found:
    """Every quantized weight of auto-round's own format, or of its gptq format. Raises CheckpointError."""
    config, packing = stored.quantization, str(stored.quantization.get("packing_format", "auto_round:auto_gptq"))
    kind = config.get("data_type", "int")
    if kind not in ("int", None):
        raise CheckpointError(f"{stored.where('data_type')}={short(kind)}: only integers are imported")
    if config.get("rotation_config"):
        raise CheckpointError(
            f"{stored.where('rotation_config')}: its weights expect rotated inputs, which are not made"
        )
    rules = AUTO_ROUND_GPTQ if "gptq" in packing and "gptqmodel" not in packing else AUTO_ROUND
    found = _read(stored, rules, _modules(stored, rules))
    activations = config.get("act_bits")
    if isinstance(activations, int) and activations < 16:
        found.notes.append(f"act_bits={activations}: inputs stay in 16 bits here")
    return found


def read_efficient_qat(stored: Stored) -> Found:
    """Every quantized weight. Raises CheckpointError."""
    return _read(stored, EFFICIENT_QAT, _modules(stored, EFFICIENT_QAT))


def _modules(stored: Stored, rules: Rules) -> list[Module]:
    """Tensors and shapes of all modules. Reads no values."""
    return [_module(stored, name, qweight, rules) for name, qweight in stored.modules("qweight")]


def _module(stored: Stored, name: str, qweight: StoredTensor, rules: Rules) -> Module:
    qzeros, scales, g_idx = stored.part(name, "qzeros"), stored.part(name, "scales"), stored.optional(name, "g_idx")
    words, rows = check_matrix(qweight, (torch.int32,), "GPTQ's codes")
    groups, columns = check_matrix(qzeros, (torch.int32,), "GPTQ's zeros")
    if check_matrix(scales, FLOATS, "GPTQ's scales") != (groups, rows):
        raise CheckpointError(f"{scales}: these are no scales of {qweight} with {qzeros}")
    if g_idx is not None and g_idx.shape == (0,):
        g_idx = None
    if g_idx is not None and (len(g_idx.shape) != 1 or g_idx.dtype not in (torch.int32, torch.int64)):
        raise CheckpointError(f"{g_idx}: the groups of the columns are one integer for each")
    fits = []
    for bits in BITS:
        packing = _packing(rules, bits)
        if packing is None or words_for(rows, bits, packing) != columns:
            continue
        held = words * (32 // bits) if packing == "fields" else words * 32 // bits
        cols = held if g_idx is None else g_idx.shape[0]
        if words_for(cols, bits, packing) == words and cols >= groups:
            fits.append((bits, packing, cols))
    said = stored.quantization.get("bits")
    fits = [fit for fit in fits if fit[0] == said] or fits if len(fits) > 1 else fits
    if len(fits) != 1:
        raise CheckpointError(
            f"{qweight}: with {qzeros} and {scales}, these are no words of {rules.name} of 2 to 8 bits"
        )
    bits, packing, cols = fits[0]
    return Module(name, qweight, qzeros, scales, g_idx, rows, cols, bits, packing)


def _packing(rules: Rules, bits: int) -> str | None:
    return (
        rules.three if bits == 3 else rules.wide if bits in WIDE else "fields" if rules.three == "fields" else "stream"
    )


def _read(stored: Stored, rules: Rules, modules: Sequence[Module]) -> Found:
    if not modules:
        raise CheckpointError(
            f"{stored.path}: no file holds a qweight; nothing is quantized in the form of {rules.name}"
        )
    found = Found()
    modules = [_looked_at(stored, rules, module, found) for module in modules]
    rules = _believed(stored, rules, modules, found)
    for module in modules:
        columns = _columns(stored, module)
        middle = module.uniform is not None and (module.uniform + rules.offset) == 1 << (module.bits - 1)
        kind = "none" if middle else "int"
        layout = columns.layout(module.rows, module.bits, kind, module.scales.dtype)
        zeros = "symmetric" if middle else "zero points"
        says = f"{rules.name}, {module.bits} bits, {columns.in_words()}, {zeros}"
        make = partial(_make, module, rules, columns, middle)
        found.add(ForeignWeight(module.name, module.parts, columns, layout, says, make))
        stored.files.release(module.qzeros.name)
    return found


def _looked_at(stored: Stored, rules: Rules, module: Module, found: Found) -> Module:
    """With the value of its zeros, where they are one; with the other packing of 3 bits where only that makes them so.

    The middle of 3 bits looks alike in no two packings, so symmetric weights show which one it is.
    """
    uniform = _uniform(stored, module, module.packing)
    if uniform is None and module.bits == 3 and module.packing != "fields" and stored.quantization.get("sym") is True:
        other = "planar" if module.packing == "stream" else "stream"
        again = _uniform(stored, module, other)
        if again in (3, 4):
            found.notes.append(f"{module.name}: its words are {other}, whatever the config says")
            return replace(module, packing=other, uniform=again)
    return replace(module, uniform=uniform)


def _uniform(stored: Stored, module: Module, packing: str) -> int | None:
    zeros = unpack(stored.files.read(module.qzeros.name).T.contiguous(), module.bits, module.rows, packing)
    first = int(zeros[0, 0])
    return first if bool((zeros == first).all()) else None


def _believed(stored: Stored, rules: Rules, modules: Sequence[Module], found: Found) -> Rules:
    """The rules, with the offset that the zeros of symmetric weights show, where all of them show another one.

    A file says v1 and holds the zeros of v2 where a program wrote the one and labelled it the other.
    """
    shown = [1 - (module.uniform - (1 << (module.bits - 1)) + 1) for module in modules if module.uniform is not None]
    shown = [offset for offset in shown if offset in (0, 1)]
    if 2 * len(shown) < len(modules) or len(set(shown)) != 1 or shown[0] == rules.offset:
        return rules
    found.notes.append(
        f"the config says {rules.name}, and the zeros of {len(shown)} symmetric weights are "
        f"{'2^(bits-1)' if shown[0] == 0 else '2^(bits-1) - 1'}: {'nothing' if shown[0] == 0 else '1'} is added to them"
    )
    return replace(rules, offset=shown[0])


def _columns(stored: Stored, module: Module) -> Columns:
    groups, where = module.scales.shape[0], str(module.qweight)
    if module.g_idx is not None:
        g_idx = stored.files.read(module.g_idx.name).long()
        if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
            raise CheckpointError(f"{module.g_idx}: names a group that is not one of the {groups} of {module.scales}")
        return Columns.of_indices(g_idx, where)
    size = group_size(stored.quantization.get("group_size"), module.cols, groups)
    if size is None:
        raise CheckpointError(f"{module.scales}: {groups} groups of {module.cols} columns, and no file says which")
    return Columns.uniform(module.cols, size, where)


def group_size(said: Any, cols: int, groups: int) -> int | None:
    """Columns in a group, where `cols` columns have `groups` of them: as the config says if that fits, else equally."""
    if type(said) is int and said > 0 and -(-cols // said) == groups:
        return said
    return cols // groups if cols % groups == 0 else None


def _make(module: Module, rules: Rules, columns: Columns, middle: bool, files: TensorFiles) -> QuantizedWeight:
    codes = unpack(files.read(module.qweight.name), module.bits, module.cols, module.packing).T.contiguous()
    scales = files.read(module.scales.name).T
    zeros = None if middle else _zeros(files.read(module.qzeros.name), module, rules)
    return columns.weight(module.bits, codes, scales, zeros)


def _zeros(words: torch.Tensor, module: Module, rules: Rules) -> torch.Tensor:
    """uint8 [N, groups]."""
    if rules.offset and rules.carries and module.bits in WORD_ONES:
        ones = torch.tensor(WORD_ONES[module.bits], dtype=torch.int32)
        return unpack((words + ones).T.contiguous(), module.bits, module.rows, module.packing)
    zeros = unpack(words.T.contiguous(), module.bits, module.rows, module.packing)
    if not rules.offset:
        return zeros
    if rules.carries:
        return (zeros + 1) & ((1 << module.bits) - 1)
    if int(zeros.max()) == 255:
        raise CheckpointError(f"{module.qzeros}: a zero point of 256 cannot be had")
    return zeros + 1
