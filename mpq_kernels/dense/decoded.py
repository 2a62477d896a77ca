"""Weights that a checkpoint stores quantized, read as the 16-bit weights that transformers makes of them.

    fp8     <name>.weight F8 [N, K] + <name>.weight_scale_inv [blocks of N, blocks of K]   -> <name>.weight [N, K]
    mxfp4   <name>_blocks U8 [E, N, K / 32, 16] + <name>_scales U8 [E, N, K / 32]          -> <name> [E, K, N]

To everything else such a checkpoint is one of 16-bit tensors: `decoded_tensors` gives names, shapes and dtypes without
reading a value, and `read` makes one tensor, or one expert of it, some rows at a time. The values are those of
`from_pretrained(..., dequantize=True)`, bit for bit; where the blocks do not divide the weight, those of the config's
block size, which is how such files are written (DeepSeek-V3 has them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.safetensors import NAMES, TensorEntry
from ..files.shards import StoredTensor, TensorFiles
from ..files.strict import short

CHUNK = 2**22  # weights that are decoded at once: fp32 temporaries of 16 MiB
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # e2m1, by its bits
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
ACTIVATION_SCALES = ("activation_scale", "input_scale")  # of static schemes; 16-bit activations have no use for them


@dataclass(frozen=True, slots=True)
class DecodedTensor(StoredTensor):
    """A 16-bit tensor that no file holds: `entry` has its dtype and shape, and the bytes of what is stored instead.

    parts: the stored tensors that it is made of, codes and scales. block: (rows, columns) that share a scale, for fp8.
    """

    parts: tuple[StoredTensor, ...] = ()
    block: tuple[int, int] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of all its parts."""
        return tuple(dict.fromkeys(part.file for part in self.parts))

    def __str__(self) -> str:
        return f"{self.parts[0]}, read as {self.entry}"

    def read(self, files: TensorFiles, index: int | None = None) -> torch.Tensor:
        """The tensor, or its index-th matrix, [1, ...]. Raises CheckpointError."""
        codes, scales = (files.read(part.name) for part in self.parts)
        if index is not None:
            codes, scales = codes[index : index + 1], scales[index : index + 1]
        made = _mxfp4(codes, scales, self.dtype) if self.block is None else self._fp8(codes, scales, self.block)
        self.release(files)
        return made

    def release(self, files: TensorFiles) -> None:
        """Give back the memory that the bytes of its parts took."""
        for part in self.parts:
            files.release(part.name)

    def _fp8(self, codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
        packed = codes.dtype == torch.int8
        rows, cols = codes.shape[-2], codes.shape[-1] * (2 if packed else 1)
        out = torch.empty(*codes.shape[:-1], cols, dtype=self.dtype)
        flat, grid = codes.reshape(-1, *codes.shape[-2:]), _factors(scales).reshape(-1, *_grid(rows, cols, block))
        step = max(1, CHUNK // (cols * block[0])) * block[0]
        for matrix, factors, made in zip(flat, grid, out.view(-1, rows, cols), strict=True):
            for start in range(0, rows, step):
                part = matrix[start : start + step]
                values = _fp4(part, torch.float32) if packed else part.float()
                wide = factors[start // block[0] :].repeat_interleave(block[0], 0)[: len(part)]
                made[start : start + step] = values * wide.repeat_interleave(block[1], 1)[:, :cols]
        return out


def known_method(quantization: Any) -> str | None:
    """The `quant_method` of a quantization_config, from any file, if its weights are decoded here; else None."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if isinstance(method, str) and method in METHODS else None


def decoded_tensors(
    where: Path, config: Mapping[str, Any], files: TensorFiles, dtype: torch.dtype
) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, those that are quantized in 16 bits. dtype: what the model computes in.

    Raises CheckpointError for codes without scales, and for shapes that do not go together.
    """
    quantization = config.get("quantization_config")
    method = known_method(quantization)
    if method is None or not isinstance(quantization, dict):
        return files.tensors
    made: dict[str, DecodedTensor] = {}
    used: set[str] = set()
    for tensor in files.tensors.values():
        found = METHODS[method](tensor, files.tensors, quantization)
        if found is not None:
            name, shape, scales, block = found
            size = tensor.entry.nbytes + scales.entry.nbytes
            entry = TensorEntry(NAMES[dtype], shape, 0, size)
            made[tensor.name] = DecodedTensor(name, tensor.file, entry, (tensor, scales), block)
            stem = tensor.name.rpartition(".")[0]
            used |= {scales.name, *(f"{stem}.{leaf}" for leaf in ACTIVATION_SCALES)}
    out: dict[str, StoredTensor] = {}
    for name, tensor in files.tensors.items():
        if name in made:
            out[made[name].name] = made[name]
        elif name not in used:
            if tensor.dtype in FP8:
                raise CheckpointError(f"{tensor}: no file holds its scales ({name}_scale_inv)")
            out[name] = tensor
    if not made:
        raise CheckpointError(f"{where}: quant_method={short(method)}, and no file holds a weight of that form")
    return out


Found = tuple[str, tuple[int, ...], StoredTensor, tuple[int, int] | None]  # name, shape, scales, block


def _find_fp8(tensor: StoredTensor, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Found | None:
    if tensor.dtype not in (*FP8, torch.int8) or len(tensor.shape) < 2:
        return None
    stem = tensor.name.removesuffix(".weight")
    names = [f"{tensor.name}_scale_inv"]
    names += [f"{stem}.scale", f"{stem}.qscale_weight"] if stem != tensor.name else []
    scales = next((tensors[name] for name in names if name in tensors), None)
    if scales is None:
        return None
    *lead, rows, cols = tensor.shape
    cols *= 2 if tensor.dtype == torch.int8 else 1
    block = _block(scales, tuple(lead), (rows, cols), config)
    if block is None or scales.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"{scales}: these are no scales of {tensor}, in blocks of {config.get('weight_block_size')}"
        )
    return tensor.name, (*lead, rows, cols), scales, block


def _block(
    scales: StoredTensor, lead: tuple[int, ...], shape: tuple[int, int], config: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where that cannot be."""
    if math.prod(scales.shape) == math.prod(lead):
        return shape  # one for each matrix
    if len(scales.shape) < 2 or scales.shape[:-2] != lead or 0 in scales.shape:
        return None
    grid = scales.shape[-2:]
    given = config.get("weight_block_size")
    sizes = given if isinstance(given, list) and all(type(size) is int and size > 0 for size in given) else []
    if len(sizes) == 2 and grid == _grid(*shape, (sizes[0], sizes[1])):
        return sizes[0], sizes[1]
    if shape[0] % grid[0] or shape[1] % grid[1]:
        return None
    return shape[0] // grid[0], shape[1] // grid[1]


def _grid(rows: int, cols: int, block: tuple[int, int]) -> tuple[int, int]:
    return -(-rows // block[0]), -(-cols // block[1])


def _find_mxfp4(tensor: StoredTensor, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Found | None:
    name = tensor.name.removesuffix("_blocks")
    if name == tensor.name:
        return None
    scales = tensors.get(f"{name}_scales")
    if scales is None:
        raise CheckpointError(f"{tensor}: no file holds its scales ({name}_scales)")
    fits = len(tensor.shape) == 4 and tensor.shape[:3] == scales.shape and tensor.shape[3] == 16
    if not fits or (tensor.dtype, scales.dtype) != (torch.uint8, torch.uint8):
        raise CheckpointError(f"{tensor}: with {scales}, these are no MXFP4 blocks of 32 weights and their scales")
    experts, rows, groups, _ = tensor.shape
    return name, (experts, 32 * groups, rows), scales, None


METHODS: dict[str, Callable[[StoredTensor, Mapping[str, StoredTensor], Mapping[str, Any]], Found | None]] = {
    "fp8": _find_fp8,
    "mxfp4": _find_mxfp4,
}


def _factors(scales: torch.Tensor) -> torch.Tensor:
    """Scales in fp32; bytes are exponents."""
    if scales.dtype == torch.uint8:
        return (scales.float() - 127.0).exp2()
    return scales.float()


def _fp4(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes [..., n] of two e2m1 numbers each, the lower four bits first -> [..., 2 n]."""
    table = torch.tensor(FP4, dtype=dtype)
    codes = packed.view(torch.uint8)
    pairs = torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], dim=-1)
    return pairs.view(*codes.shape[:-1], 2 * codes.shape[-1])


def _mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[E, N, K / 32, 16] and exponents [E, N, K / 32] -> [E, K, N]."""
    experts, rows, groups, _ = blocks.shape
    out = torch.empty(experts, 32 * groups, rows, dtype=dtype)
    step = max(1, CHUNK // (32 * groups))
    for expert in range(experts):
        for start in range(0, rows, step):
            part = slice(start, start + step)
            exponents = scales[expert, part].to(torch.int32)[..., None] - 127
            values = torch.ldexp(_fp4(blocks[expert, part], dtype), exponents).to(dtype)
            out[expert, :, part] = values.view(-1, 32 * groups).T
    return out
