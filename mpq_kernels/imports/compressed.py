"""compressed-tensors: llm-compressor's checkpoints of integers.

    pack-quantized     weight_packed int32 [N, words along K]   weight_shape int64 [2] = (N, K)
    int-quantized, naive-quantized                              weight int8 [N, K]
    all                weight_scale [N, groups], [N, 1] or one  weight_zero_point   weight_g_idx int32 [K]

    W[n, k] = (code - zero) * scale       codes and zeros are signed; + 2^(bits-1) makes them ours

Words are a stream of codes since version 0.18, and fields before (words.py); which of the two, their number says. Zeros
are packed in the same way along N, int32 [words, groups], or are int8 [N, groups]. Widths are those of the config's
group for a module, or where no group names it the only ones that its shapes allow.

Source: compressed-tensors 0.20.0 and 0.17.0 (compressors.pack_quantized, quantization.lifecycle.forward, utils.match).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..errors import CheckpointError, PlanError
from ..files.shards import StoredTensor, TensorFiles
from ..files.strict import short
from ..format.weights import QuantizedWeight
from ..plan.patterns import Clock, compile_pattern, why_too_many
from .columns import Columns
from .gptq import group_size
from .stored import FLOATS, Stored, check_matrix
from .weight import ForeignWeight, Found
from .words import unpack, words_for

REGEX = "re:"
CLASSES = ("Linear", "Embedding", "Module")
PACKED, PLAIN = "weight_packed", "weight"
INTEGERS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense", None)
OTHERS = {
    "float-quantized": "weights in fp8 are no integers",
    "nvfp4-pack-quantized": "weights in nvfp4 are no integers",
    "mxfp4-pack-quantized": "weights in mxfp4 are no integers",
    "mxfp6-pack-quantized": "weights in mxfp6 are no integers",
    "mxfp8-quantized": "weights in mxfp8 are no integers",
    "marlin-24": "its words are in the order of Marlin's kernel for sparse weights",
}


@dataclass(frozen=True)
class Module:
    """The tensors of one weight. packing: of its words; None for codes in int8."""

    name: str
    codes: StoredTensor
    scale: StoredTensor
    zero: StoredTensor | None
    shape: StoredTensor | None
    g_idx: StoredTensor | None
    rows: int
    bits: int
    packing: str | None
    columns: Columns

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """All stored tensors."""
        held = (self.codes, self.scale, self.zero, self.shape, self.g_idx)
        return tuple(part for part in held if part is not None)


def is_compressed(stored: Stored) -> bool:
    """Whether a config is one of compressed-tensors."""
    return stored.method == "compressed-tensors" or isinstance(stored.quantization.get("config_groups"), dict)


def read_compressed(stored: Stored) -> Found:
    """Every quantized weight. Raises CheckpointError."""
    config, found = stored.quantization, Found()
    groups = config.get("config_groups")
    groups = groups if isinstance(groups, dict) else {}
    _check_config(stored, config, groups)
    named = [(name, tensor) for leaf in (PACKED, PLAIN) for name, tensor in stored.modules(leaf)]
    codes = [(name, tensor) for name, tensor in named if tensor.dtype in (torch.int32, torch.int8)]
    for name, tensor in named:
        if f"{name}.weight_scale" in stored.tensors and (name, tensor) not in codes:
            raise CheckpointError(f"{tensor}: weights of this dtype are no integers, and only those are imported")
    schemes = _schemes(stored, groups, [name for name, _ in codes])
    for name, tensor in codes:
        module = _module(stored, name, tensor, schemes.get(name, {}))
        zeros = None if module.zero is None else _zeros(stored.files, module)
        middle = zeros is None or bool((zeros == 1 << (module.bits - 1)).all())
        # The zero of one bit without zero points is between its codes here, and not the upper one.
        kind = "none" if middle and module.bits > 1 else "int"
        layout = module.columns.layout(module.rows, module.bits, kind, module.scale.dtype)
        form = "int8" if module.packing is None else f"packed {module.packing}"
        symmetry = "symmetric" if middle else "zero points"
        says = f"compressed-tensors, {form}, {module.bits} bits, {module.columns.in_words()}, {symmetry}"
        make = partial(_make, module, kind)
        found.add(ForeignWeight(name, module.parts, module.columns, layout, says, make))
    if not found.weights:
        raise CheckpointError(f"{stored.path}: no file holds a {PACKED} or integers called {PLAIN}")
    if any(isinstance(group, dict) and group.get("input_activations") for group in groups.values()):
        found.notes.append("input_activations: inputs stay in 16 bits here")
    for leaf in ("input_scale", "input_zero_point", "input_global_scale"):
        found.used.update(f"{name}.{leaf}" for name, _ in codes if f"{name}.{leaf}" in stored.tensors)
    return found


def _check_config(stored: Stored, config: Mapping[str, Any], groups: Mapping[str, Any]) -> None:
    """Raise CheckpointError for forms of weights that are not imported."""
    formats = [("format", config.get("format"))]
    formats += [(f"config_groups.{key}.format", g.get("format")) for key, g in groups.items() if isinstance(g, dict)]
    for place, form in formats:
        if form not in INTEGERS:
            why = OTHERS.get(form, "is not known") if isinstance(form, str) else "is not known"
            raise CheckpointError(f"{stored.where(place)}={short(form)}: {why}")
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        raise CheckpointError(f"{stored.where('sparsity_config')}: sparse weights are stored in a form of their own")
    if config.get("transform_config"):
        raise CheckpointError(f"{stored.where('transform_config')}: its weights expect transformed inputs")


def _schemes(stored: Stored, groups: Mapping[str, Any], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Module -> `weights` of the group that names it: exactly, else by an expression, else by class."""
    targets: dict[str, dict[str, Any]] = {}
    for key, group in groups.items():
        listed = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(listed, list) or not all(isinstance(target, str) for target in listed):
            raise CheckpointError(f"{stored.where(f'config_groups.{key}')}: has no list of targets")
        weights = group.get("weights")
        targets |= dict.fromkeys(listed, weights if isinstance(weights, dict) else {})
    texts = sorted(target for target in targets if target.startswith(REGEX))
    try:
        reason, clock = why_too_many([text.removeprefix(REGEX) for text in texts]), Clock()
        if reason is not None:
            raise PlanError(reason)
        patterns = [
            (compile_pattern(t.removeprefix(REGEX), stored.where(f"target {short(t)}"), clock), t) for t in texts
        ]
        by_class = next((targets[name] for name in CLASSES if name in targets), None)
        out = {}
        for name in names:
            first = next((text for pattern, text in patterns if pattern.match(name)), None)
            chosen = targets.get(name) or (targets[first] if first is not None else by_class)
            if chosen:
                out[name] = chosen
    except PlanError as error:
        raise CheckpointError(str(error)) from error
    return out


def _module(stored: Stored, name: str, codes: StoredTensor, scheme: Mapping[str, Any]) -> Module:
    scale = stored.part(name, "weight_scale")
    zero, g_idx = stored.optional(name, "weight_zero_point"), stored.optional(name, "weight_g_idx")
    shape, bits, packing = None, 8, None
    if codes.dtype == torch.int32:
        rows, words = check_matrix(codes, (torch.int32,), "packed codes")
        shape = stored.part(name, "weight_shape")
        if shape.shape != (2,) or shape.dtype not in (torch.int64, torch.int32):
            raise CheckpointError(f"{shape}: a shape is two integers")
        said, cols = stored.files.read(shape.name).tolist()
        if said != rows or cols < 1:
            raise CheckpointError(f"{codes}: has not the shape that {shape.name} says, {said} x {cols}")
        bits, packing = _width(stored, codes, cols, words, scheme)
    else:
        rows, cols = check_matrix(codes, (torch.int8,), "codes")
    groups = _groups(scale, rows)
    columns = _columns(stored, codes, g_idx, cols, groups, scheme)
    if zero is not None:
        packed = (words_for(rows, bits, packing or "stream"), groups)
        fits = zero.shape == packed if zero.dtype == torch.int32 else zero.shape == scale.shape
        if zero.dtype not in (torch.int32, torch.int8) or not fits:
            raise CheckpointError(f"{zero}: these are no zero points of {codes} with {scale}")
    return Module(name, codes, scale, zero, shape, g_idx, rows, bits, packing, columns)


def _width(stored: Stored, codes: StoredTensor, cols: int, words: int, scheme: Mapping[str, Any]) -> tuple[int, str]:
    """(bits, packing) of words: what the config says if it fits, else the only width that does."""
    fits = [(b, p) for b in range(1, 9) for p in ("stream", "fields") if words_for(cols, b, p) == words]
    said = scheme.get("num_bits")
    chosen = [fit for fit in fits if said is None or fit[0] == said]
    if not chosen or len({bits for bits, _ in chosen}) > 1:
        raise CheckpointError(f"{codes}: {words} words for {cols} codes are none of num_bits={short(said)}")
    return chosen[0]


def _groups(scale: StoredTensor, rows: int) -> int:
    if scale.dtype not in FLOATS:
        raise CheckpointError(f"{scale}: scales are float16, bfloat16 or float32")
    if scale.shape in ((), (1,), (rows,)):
        return 1
    if len(scale.shape) == 2 and scale.shape[0] in (1, rows) and scale.shape[1] > 0:
        return scale.shape[1]
    raise CheckpointError(f"{scale}: these are no scales of {rows} rows; blocks of rows cannot be imported")


def _columns(
    stored: Stored, codes: StoredTensor, g_idx: StoredTensor | None, cols: int, groups: int, scheme: Mapping[str, Any]
) -> Columns:
    if g_idx is not None:
        if g_idx.shape != (cols,) or g_idx.dtype not in (torch.int32, torch.int64):
            raise CheckpointError(f"{g_idx}: the groups of the columns are one integer for each")
        indices = stored.files.read(g_idx.name).long()
        if not bool((indices == -1).all()):  # which stands for no order at all
            if int(indices.min()) < 0 or int(indices.max()) >= groups:
                raise CheckpointError(f"{g_idx}: names a group that is not one of {groups}")
            return Columns.of_indices(indices, str(codes))
    size = group_size(scheme.get("group_size"), cols, groups) if groups <= cols else None
    if size is None:
        raise CheckpointError(f"{codes}: {groups} groups of {cols} columns, and no file says which")
    return Columns.uniform(cols, size, str(codes))


def _make(module: Module, kind: str, files: TensorFiles) -> QuantizedWeight:
    cols, half = module.columns.runs[-1].k1, 1 << (module.bits - 1)
    stored = files.read(module.codes.name)
    if module.packing is None:
        codes = (stored.to(torch.int16) + half).to(torch.uint8)
    else:
        codes = unpack(stored.T.contiguous(), module.bits, cols, module.packing).T.contiguous()
    scales = files.read(module.scale.name).reshape(-1, _groups(module.scale, module.rows)).expand(module.rows, -1)
    zeros = None
    if kind != "none":
        zeros = _zeros(files, module) if module.zero is not None else torch.full(scales.shape, half, dtype=torch.uint8)
    return module.columns.weight(module.bits, codes, scales, zeros)


def _zeros(files: TensorFiles, module: Module) -> torch.Tensor:
    """uint8 [N, groups]."""
    assert module.zero is not None
    stored, groups = files.read(module.zero.name), _groups(module.scale, module.rows)
    if stored.dtype == torch.int32:
        return unpack(stored, module.bits, module.rows, module.packing or "stream")
    zeros = stored.reshape(-1, groups).expand(module.rows, -1).to(torch.int16) + (1 << (module.bits - 1))
    if int(zeros.min()) < 0:
        raise CheckpointError(f"{module.zero}: a zero point below the codes")
    return zeros.to(torch.uint8)
