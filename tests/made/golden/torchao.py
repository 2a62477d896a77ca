"""torchao: tensors that it quantizes, flattened as transformers saves them, dequantized by themselves."""

from __future__ import annotations

import json

import torch
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

from . import Golden

N, K = 32, 64
ASYMMETRIC = {"mapping_type": MappingType.ASYMMETRIC}
CASES = {
    "int8": (Int8WeightOnlyConfig(), torch.bfloat16),
    "int8 in fp32": (Int8WeightOnlyConfig(), torch.float32),
    **{
        f"int{bits}": (
            IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(32)),
            torch.bfloat16,
        )
        for bits in range(1, 9)
    },
    "int4 asymmetric": (
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16), **ASYMMETRIC),
        torch.float16,
    ),
    "int3 by row": (IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerAxis(0), **ASYMMETRIC), torch.float32),
}


def make() -> Golden:
    """Every case."""
    golden = Golden()
    torch.manual_seed(0)
    for case, (config, dtype) in CASES.items():
        layer = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False)).to(dtype)
        quantize_(layer, config)
        weight = layer[0].weight
        tensors, metadata = flatten_tensor_state_dict({"m.weight": weight})
        said = {"quant_method": "torchao"}
        golden.add(
            case, tensors, said, weight.dequantize(), metadata={k: v for k, v in metadata.items() if k != "format"}
        )
        assert json.loads(metadata["m.weight"])["_type"].endswith("Tensor")
    return golden
