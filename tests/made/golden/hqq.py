"""HQQ: layers that it quantizes on the CPU, dequantized by it in fp32, with the scales and zeros that it stores."""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

from . import Golden

N, K = 32, 64
CASES = {
    "1 bit": (1, 32), "2 bits": (2, 16), "3 bits": (3, 32), "4 bits": (4, 32), "5 bits": (5, 64), "8 bits": (8, None),
}  # fmt: skip


def make() -> Golden:
    """Every case."""
    golden = Golden()
    torch.manual_seed(0)
    for case, (bits, size) in CASES.items():
        config = BaseQuantizeConfig(nbits=bits, group_size=size, axis=1)
        layer = HQQLinear(torch.nn.Linear(K, N, bias=False), config, compute_dtype=torch.float16, device="cpu")
        wide = {
            "compute_dtype": torch.float32,
            "scale": layer.meta["scale"].float(),
            "zero": layer.meta["zero"].float(),
        }
        weight = Quantizer.dequantize(layer.W_q, layer.meta | wide)
        assert torch.allclose(weight, layer.dequantize().float(), rtol=0.01, atol=0.01)
        tensors = {f"m.{name}": tensor.data for name, tensor in layer.state_dict().items()}
        golden.add(case, tensors, {"quant_method": "hqq"}, weight)
    return golden
