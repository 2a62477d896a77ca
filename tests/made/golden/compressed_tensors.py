"""compressed-tensors 0.20: weights that its compressors pack, and what they decompress them to."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from . import Golden

N, K = 32, 64
# case -> format, bits, symmetric, group size (None: of a row, 0: of the whole), dtype of the scales
CASES = {
    **{f"{bits} bits": ("pack-quantized", bits, True, 32, torch.bfloat16) for bits in range(1, 9)},
    **{f"{bits} bits asymmetric": ("pack-quantized", bits, False, 32, torch.float16) for bits in range(1, 9)},
    "4 bits by row": ("pack-quantized", 4, True, None, torch.float32),
    "4 bits asymmetric by row": ("pack-quantized", 4, False, None, torch.float16),
    "int8 by row": ("int-quantized", 8, True, None, torch.bfloat16),
    "int8 asymmetric": ("naive-quantized", 8, False, None, torch.float16),
    "int8 in groups": ("naive-quantized", 8, True, 16, torch.float32),
    "int8 with one scale": ("int-quantized", 8, True, 0, torch.float16),
    "int4 in int8": ("naive-quantized", 4, True, 32, torch.bfloat16),
}


def make() -> Golden:
    """Every case."""
    golden = Golden()
    for seed, (case, row) in enumerate(CASES.items()):
        golden.add(case, *layer(seed, *row, PackedQuantizationCompressor, NaiveQuantizationCompressor))
    return golden


def layer(seed, form, bits, symmetric, size, dtype, packer, naive, order=None):
    """(tensors, quantization_config, dequantized [N, K]) of one layer. order: its actorder; "group": any columns."""
    rng = torch.Generator().manual_seed(seed)
    groups = 1 if not size else K // size
    strategy = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    words = {"num_bits": bits, "type": "int", "symmetric": symmetric} | (
        strategy if size != 0 else {"strategy": "tensor"}
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**words, actorder=order))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    scales = (torch.rand(N, groups, generator=rng) * 0.02 + 0.001).to(dtype)
    scales = scales[:1, 0] if size == 0 else scales
    zeros = torch.zeros(scales.shape, dtype=torch.int8)
    if not symmetric:
        zeros = torch.randint(low, high, scales.shape, generator=rng, dtype=torch.int8)
    codes = torch.randint(low, high, (N, K), generator=rng)
    g_idx = torch.arange(K) // (K // groups)
    g_idx = g_idx[torch.randperm(K, generator=rng)] if order == "group" else g_idx
    by_column = [each.reshape(-1, groups).expand(N, -1)[:, g_idx] for each in (zeros, scales)]
    state = {"weight": ((codes - by_column[0]) * by_column[1].float()).to(dtype), "weight_scale": scales}
    state |= {"weight_zero_point": zeros} if not symmetric else {}
    state |= {"weight_g_idx": g_idx.to(torch.int32)} if order == "group" else {}
    compressor = packer if form == "pack-quantized" else naive
    held = compressor.compress(state, scheme)
    weight = compressor.decompress(held, scheme)["weight"]
    off = (weight.float() - state["weight"].float()).abs() > by_column[1].float() * 1.01
    assert not bool(off.any()), (form, bits, symmetric, size, int(off.sum()))
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": scheme.model_dump()}}
    return {f"m.{name}": tensor for name, tensor in held.items()}, config, weight
