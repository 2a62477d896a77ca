"""optimum-quanto: layers that it quantizes and freezes, dequantized by their own tensors."""

from __future__ import annotations

import torch
from optimum.quanto import freeze, qint8, quantize

from . import Golden


def make() -> Golden:
    """Every case."""
    golden = Golden()
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model = torch.nn.ModuleDict({"m": torch.nn.Linear(64, 32, bias=False)}).to(dtype)
        quantize(model, weights=qint8)
        freeze(model)
        tensors = {name: tensor.data for name, tensor in model.state_dict().items()}
        golden.add(f"qint8 {str(dtype).removeprefix('torch.')}", tensors, {}, model["m"].weight.dequantize())
    return golden
