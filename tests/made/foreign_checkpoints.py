"""Tiny models as other programs quantize them, and as the dense models that those mean.

    twin = gptq_checkpoint(tmp_path / "gptq", "llama")     -> the dense tensors by name, also in tmp_path / "gptq-dense"

Codes are random. Words are made of bits by numpy, not by the tables of the importers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.made.checkpoints import tiny_model
from tests.made.gguf_file import write_gguf
from tests.made.other_linears import tiny_other

KEPT = ("embed", "wte", "wpe", "lm_head", "norm", "ln_", "mlp.gate.", "moe.gate.", "router")
SIZES = {"intermediate_size": 192}
Tensors = dict[str, torch.Tensor]
# (name of the module, weight [N, K] in fp32, generator) -> tensors of the module, and what they mean [N, K]
Quantize = Callable[[str, torch.Tensor, torch.Generator], tuple[Tensors, torch.Tensor]]


def packed_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[count, columns] -> int32 [count * bits / 32, columns], one code behind the other from the lowest bit on."""
    values = codes.numpy().astype(np.uint8)
    each = (values[:, None] >> np.arange(bits, dtype=np.uint8)[:, None]) & 1  # [count, bits, columns]
    flat = each.reshape(-1, values.shape[1])
    flat = np.pad(flat, ((0, -len(flat) % 32), (0, 0)))
    held = np.packbits(flat, axis=0, bitorder="little")  # [bytes, columns]
    return torch.from_numpy(np.ascontiguousarray(held.T).view("<i4").T.copy())


def random_codes(weight: torch.Tensor, bits: int, size: int, symmetric: bool, rng: torch.Generator) -> tuple:
    """(codes [N, K], scales fp16 [N, groups], zeros [N, groups]) of about the magnitude of a weight."""
    rows, cols = weight.shape
    groups = -(-cols // size)
    codes = torch.randint(0, 2**bits, (rows, cols), generator=rng)
    scales = ((torch.rand(rows, groups, generator=rng) + 0.5) * weight.std() / 2**bits).half()
    zeros = torch.full((rows, groups), 2 ** (bits - 1))
    return codes, scales, zeros if symmetric else torch.randint(1, 2**bits, (rows, groups), generator=rng)


def meant(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor) -> torch.Tensor:
    """(code - zero) * scale, fp32 [N, K]."""
    return (codes - zeros[:, g_idx]).float() * scales.float()[:, g_idx]


def foreign_checkpoint(
    path: Path,
    family: str,
    quantize: Quantize,
    config: dict[str, Any] | None,
    sizes: Mapping[str, Any] = SIZES,
    files: int = 1,
    kept: tuple[str, ...] = KEPT,
    **words: Any,
) -> Tensors:
    """Write a checkpoint whose linears are what `quantize` makes of them, and its dense twin, whose tensors it gives.

    files: in so many files. kept: parts of names of what is not quantized.
    """
    torch.manual_seed(0)
    transposed = family == "gpt2"  # whose linears are Conv1D: weights [K, N]
    if transposed:
        tiny_other(family, path)
    else:
        tiny_model(family, path, sizes=sizes, **words)
    rng, out, twin = torch.Generator().manual_seed(7), {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        module, _, leaf = name.rpartition(".")
        if tensor.dim() != 2 or leaf != "weight" or any(part in name for part in kept):
            out[name] = twin[name] = tensor
            continue
        made, dense = quantize(module, (tensor.T if transposed else tensor).float(), rng)
        dense = dense.T if transposed else dense
        out |= {f"{module}.{key}": value.contiguous() for key, value in made.items()}
        twin[name] = dense.to(tensor.dtype).contiguous()
    shutil.copytree(path, path.with_name(f"{path.name}-dense"))
    save_file(twin, path.with_name(f"{path.name}-dense") / "model.safetensors", {"format": "pt"})
    _save(out, path, files)
    if config is not None:
        said = json.loads((path / "config.json").read_text()) | {"quantization_config": config}
        (path / "config.json").write_text(json.dumps(said))
    (path / "quantize_config.json").write_text(json.dumps(config or {}))
    return twin


def _save(tensors: Tensors, path: Path, files: int) -> None:
    """In one file, or in several with an index: a tensor behind the other into the next file."""
    if files == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return
    (path / "model.safetensors").unlink()
    names = [f"model-{index:05}-of-{files:05}.safetensors" for index in range(1, files + 1)]
    placed = {name: names[index % files] for index, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in placed if placed[name] == file}, path / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": placed}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def gptq_checkpoint(
    path: Path,
    family: str = "llama",
    bits: Callable[[str], int] = lambda name: 4,
    size: int = 32,
    symmetric: bool = False,
    version: str = "gptq_v2",
    label: str | None = None,
    order: Callable[[str], int] | None = None,
    **words: Any,
) -> Tensors:
    """In GPTQ's form. bits: of a module. order: seed of the order of a module's columns (act-order). label: what the
    config says, where that is another version.
    """

    def quantize(module: str, weight: torch.Tensor, rng: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        width, cols = bits(module), weight.shape[1]
        codes, scales, zeros = random_codes(weight, width, size, symmetric, rng)
        g_idx = torch.arange(cols) // size
        if order is not None:
            g_idx = g_idx[torch.randperm(cols, generator=torch.Generator().manual_seed(order(module)))]
        stored = zeros - 1 if version == "gptq" else zeros
        tensors = {
            "qweight": packed_bits(codes.T, width),
            "qzeros": packed_bits(stored, width).T,
            "scales": scales.T,
            "g_idx": g_idx.to(torch.int32),
        }
        return tensors, meant(codes, scales, zeros, g_idx)

    config = {"quant_method": "gptq", "bits": 4, "group_size": size, "checkpoint_format": label or version}
    return foreign_checkpoint(path, family, quantize, config | {"sym": symmetric}, **words)


def awq_checkpoint(path: Path, family: str = "llama", size: int = 32, symmetric: bool = False, **words: Any) -> Tensors:
    """In AWQ's gemm form."""

    def rows(values: torch.Tensor) -> torch.Tensor:  # rows 0 2 4 6 1 3 5 7 of each eight
        return values.view(-1, 8, values.shape[1])[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(values.shape)

    def quantize(module: str, weight: torch.Tensor, rng: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes, scales, zeros = random_codes(weight, 4, size, symmetric, rng)
        tensors = {
            "qweight": packed_bits(rows(codes), 4).T,
            "qzeros": packed_bits(rows(zeros), 4).T,
            "scales": scales.T,
        }
        return tensors, meant(codes, scales, zeros, torch.arange(weight.shape[1]) // size)

    config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": not symmetric, "version": "gemm"}
    return foreign_checkpoint(path, family, quantize, config, **words)


def compressed_checkpoint(
    path: Path, family: str = "llama", bits: Callable[[str], int] = lambda name: 4, size: int = 32, **words: Any
) -> Tensors:
    """In the form of compressed-tensors: packed where the width is not 8, else int8; a group for each width."""
    groups: dict[int, list[str]] = {}

    def quantize(module: str, weight: torch.Tensor, rng: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        width, cols = bits(module), weight.shape[1]
        groups.setdefault(width, []).append(module)
        codes, scales, zeros = random_codes(weight, width, size, False, rng)
        half, dense = 2 ** (width - 1), meant(codes, scales, zeros, torch.arange(cols) // size)
        if width == 8:
            signed = {"weight": (codes - half).to(torch.int8), "weight_zero_point": (zeros - half).to(torch.int8)}
            return signed | {"weight_scale": scales}, dense
        packed = {"weight_packed": packed_bits(codes.T, width).T, "weight_zero_point": packed_bits(zeros, width)}
        return packed | {"weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}, dense

    config: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {}}
    twin = foreign_checkpoint(path, family, quantize, config, **words)
    for width, names in groups.items():
        weights = {"num_bits": width, "type": "int", "symmetric": False, "strategy": "group", "group_size": size}
        config["config_groups"][f"group_{width}"] = {"targets": names, "weights": weights}
    said = json.loads((path / "config.json").read_text()) | {"quantization_config": config}
    (path / "config.json").write_text(json.dumps(said))
    return twin


def mlx_checkpoint(path: Path, family: str = "llama", size: int = 32, **words: Any) -> Tensors:
    """In MLX's form: 6 bits in the second layer, 4 elsewhere; the embedding too."""
    own: dict[str, Any] = {}

    def quantize(module: str, weight: torch.Tensor, rng: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        width = 6 if "layers.1" in module else 4
        if width != 4:
            own[module] = {"bits": width, "group_size": size}
        codes, scales, _ = random_codes(weight, width, size, True, rng)
        biases = (torch.randn(scales.shape, generator=rng) * weight.std()).half()
        g_idx = torch.arange(weight.shape[1]) // size
        dense = codes.float() * scales.float()[:, g_idx] + biases.float()[:, g_idx]
        words = packed_bits(codes.T, width).T.contiguous().view(torch.uint32)
        return {"weight": words, "scales": scales, "biases": biases}, dense

    twin = foreign_checkpoint(path, family, quantize, None, kept=tuple(set(KEPT) - {"embed"}), **words)
    said = json.loads((path / "config.json").read_text()) | {"quantization": {"bits": 4, "group_size": size} | own}
    (path / "config.json").write_text(json.dumps(said))
    return twin


def gguf_checkpoint(path: Path, family: str = "llama", **words: Any) -> Tensors:
    """A GGUF of Q8_0, and of Q4_1 in the second layer, beside a config.json."""
    blocks: dict[str, tuple[int, bytes]] = {}
    heads = {"q_proj": 4, "k_proj": 2}

    def quantize(module: str, weight: torch.Tensor, rng: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        rows, cols = weight.shape
        wide = "layers.1" not in module
        codes, scales, zeros = random_codes(weight, 8 if wide else 4, 32, True, rng)
        mins = (torch.randn(scales.shape, generator=rng) * weight.std()).half()
        g_idx = torch.arange(cols) // 32
        dense = meant(codes, scales, zeros, g_idx)
        if not wide:
            dense = codes.float() * scales.float()[:, g_idx] + mins.float()[:, g_idx]
        count = heads.get(module.rpartition(".")[2])
        order = torch.arange(rows)
        if count and family == "llama":  # as ggml turns the rows of queries and keys
            order = order.view(count, 2, rows // count // 2).transpose(1, 2).reshape(-1)
        held = b""
        for row in order.tolist():
            for group in range(cols // 32):
                part = codes[row, 32 * group : 32 * group + 32].numpy().astype(np.uint8)
                held += scales[row, group].numpy().tobytes()
                if wide:
                    held += (part ^ 128).tobytes()
                else:
                    held += mins[row, group].numpy().tobytes() + (part[:16] | (part[16:] << 4)).tobytes()
        blocks[module] = (8 if wide else 3, held)
        return {"weight": dense}, dense

    twin = foreign_checkpoint(path, family, quantize, None, **words)
    named = {}
    for name, tensor in twin.items():
        module, leaf = name.rsplit(".", 1)
        kind = (0, tensor.float().numpy().tobytes()) if module not in blocks or leaf != "weight" else blocks[module]
        named[f"{_gguf_name(module)}.{leaf}"] = (kind[0], tuple(tensor.shape), kind[1])
    write_gguf(path / "model.gguf", family, named)
    (path / "model.safetensors").unlink()
    return twin


def _gguf_name(module: str) -> str:
    """ggml's name of a module of a plain decoder."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if module in outer:
        return outer[module]
    inner = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "o_proj": "attn_output"}
    _, _, layer, rest = module.split(".", 3)
    leaf = rest.rpartition(".")[2]
    own = f"{'attn' if 'self_attn' in rest else 'ffn'}_{leaf.removesuffix('_proj')}"
    return f"blk.{layer}.{inner.get(leaf, own)}"
