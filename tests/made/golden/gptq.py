"""GPTQModel: words that its own layers pack, dequantized by them in the dtype of the scales."""

from __future__ import annotations

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

from . import Golden

N, K = 32, 64
# case -> bits, group size, symmetric, format, order of columns, dtype of the scales
CASES = {
    "v1 2 bits": (2, 32, True, "gptq", "plain", torch.float16),
    "v1 2 bits asymmetric": (2, 32, False, "gptq", "plain", torch.float16),
    "v1 3 bits": (3, 32, True, "gptq", "plain", torch.float16),
    "v1 3 bits asymmetric": (3, 64, False, "gptq", "plain", torch.float16),
    "v1 4 bits": (4, 32, True, "gptq", "plain", torch.float16),
    "v1 4 bits asymmetric": (4, 32, False, "gptq", "plain", torch.float16),
    "v1 4 bits asymmetric act-order": (4, 32, False, "gptq", "act-order", torch.float16),
    "v1 8 bits": (8, -1, True, "gptq", "plain", torch.float16),
    "v1 8 bits asymmetric": (8, 32, False, "gptq", "plain", torch.float16),
    "v2 2 bits asymmetric": (2, 64, False, "gptq_v2", "plain", torch.float16),
    "v2 3 bits asymmetric": (3, 32, False, "gptq_v2", "act-order", torch.float16),
    "v2 4 bits": (4, 64, True, "gptq_v2", "plain", torch.float16),
    "v2 4 bits asymmetric bf16": (4, 32, False, "gptq_v2", "plain", torch.bfloat16),
    "v2 8 bits asymmetric": (8, 32, False, "gptq_v2", "act-order", torch.float16),
    "planar 3 bits": (3, 32, True, "gptq_p", "plain", torch.float16),
    "planar 3 bits asymmetric": (3, 32, False, "gptq_p", "plain", torch.float16),
    "planar 4 bits asymmetric": (4, 32, False, "gptq_p", "plain", torch.float16),
    "planar 5 bits": (5, 32, True, "gptq_p", "plain", torch.float16),
    "planar 5 bits asymmetric": (5, 32, False, "gptq_p", "act-order", torch.float16),
    "planar 6 bits asymmetric": (6, 64, False, "gptq_p", "plain", torch.float16),
    "planar 7 bits asymmetric": (7, 32, False, "gptq_p", "plain", torch.bfloat16),
    "v1 label, 5 bits": (5, 32, False, "gptq", "plain", torch.float16),
}


def make() -> Golden:
    """Every case."""
    golden = Golden()
    for number, (case, row) in enumerate(CASES.items()):
        tensors, config, weight = layer(number, *row)
        golden.add(case, tensors, config, weight)
    return golden


def layer(seed, bits, group, symmetric, form, order, dtype):
    """(tensors, quantization_config, dequantized [N, K]) of one layer that GPTQModel packs."""
    rng = torch.Generator().manual_seed(seed)
    size = K if group == -1 else group
    groups = K // size
    codes = torch.randint(0, 2**bits, (N, K), generator=rng)
    scales = (torch.rand(N, groups, generator=rng) * 0.02 + 0.001).to(dtype)
    zeros = torch.full((N, groups), 2 ** (bits - 1))
    if not symmetric:  # 0 is one of them: v1 stores it as 2^bits - 1, and carries when it is read
        zeros = torch.randint(0, 2**bits, (N, groups), generator=rng)
    g_idx = torch.arange(K) // size
    if order == "act-order":
        g_idx = g_idx[torch.randperm(K, generator=rng)]
    linear = torch.nn.Linear(K, N, bias=False)
    wide = (codes - zeros[:, g_idx]) * scales.float()[:, g_idx]
    linear.weight.data = wide
    made = TorchLinear(bits, group, symmetric, order != "plain", K, N, format=FORMAT(form))
    made.pack_block(linear, scales.float(), zeros.float(), g_idx.to(torch.int32))
    made.scales, made.g_idx = scales.T.contiguous(), g_idx.to(torch.int32)
    config = QuantizeConfig(bits=bits, group_size=group, sym=symmetric)
    if form == "gptq" and bits not in (5, 6, 7):
        convert_gptq_v2_to_v1_format_module(made, config)
    tensors = {f"m.{name}": getattr(made, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
    if form == "gptq" and bits not in (5, 6, 7):
        convert_gptq_v1_to_v2_format_module(made, bits, torch.int32)
    weight = made.dequantize_weight().T
    assert torch.equal(weight.float(), wide.to(dtype).float()), (bits, form)
    said = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "checkpoint_format": form}
    return tensors, said | {"desc_act": order != "plain"}, weight
