"""gguf-py and libgguf: blocks that they quantize, dequantized by gguf-py in fp32."""

from __future__ import annotations

import gguf
import libgguf
import numpy as np
import torch

from . import Golden

N = 8
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4")


def make() -> Golden:
    """Every case; the type of ggml stands in its config."""
    golden = Golden()
    rng = np.random.default_rng(0)
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        weight = rng.standard_normal((N, 512 if name.endswith("K") else 64)).astype(np.float32)
        blocks = libgguf.quantize_rows(weight, kind) if name.endswith("K") else gguf.quants.quantize(weight, kind)
        blocks = np.asarray(blocks).view(np.uint8).reshape(N, -1)
        dense = torch.from_numpy(gguf.quants.dequantize(blocks, kind).astype(np.float32))
        golden.add(
            name, {"m.weight": torch.from_numpy(blocks.copy())}, {"type": int(kind), "cols": weight.shape[1]}, dense
        )
    return golden
