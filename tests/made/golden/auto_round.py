"""auto-round: words of its own layers and of its gptq and awq ones, dequantized by their own products with ones."""

from __future__ import annotations

import torch
from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

from . import Golden

N, K = 32, 64
LAYERS = {"auto_round:auto_gptq": qlinear_torch_zp, "auto_round": qlinear_torch}
# case -> packing format, bits, group size, symmetric
CASES = {
    **{f"gptq {bits} bits": ("auto_round:auto_gptq", bits, 32, True) for bits in range(2, 9)},
    **{f"own {bits} bits asymmetric": ("auto_round", bits, 32, False) for bits in range(2, 9)},
    "gptq 5 bits asymmetric": ("auto_round:auto_gptq", 5, 64, False),
    **{f"awq {bits} bits": ("auto_round:auto_awq", bits, 32, False) for bits in range(4, 8)},
}


def make() -> Golden:
    """Every case."""
    golden = Golden()
    for seed, (case, (packing, bits, size, symmetric)) in enumerate(CASES.items()):
        rng = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 2**bits, (N, K), generator=rng)
        scales = (torch.rand(N, K // size, generator=rng) * 0.02 + 0.001).half()
        zeros = torch.randint(0, 2**bits, scales.shape, generator=rng)
        if symmetric:
            zeros = torch.full(scales.shape, 2 ** (bits - 1))
        wide = ((codes - zeros.repeat_interleave(size, 1)) * scales.float().repeat_interleave(size, 1)).half()
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.data = wide.float()
        weight, held = wide, ("qweight", "qzeros", "scales")
        if packing.endswith("awq"):
            made = WQLinear_GEMM.from_linear(
                linear, bits, size, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
            )
            weight = dequantize_gemm(made.qweight, made.qzeros, made.scales, bits, size).T
        else:
            made = LAYERS[packing].QuantLinear(bits, size, K, N, False)
            made.device = "cpu"
            made.pack(linear, scales.float(), 2 ** (bits - 1) if symmetric else zeros, None, "cpu")
            weight = made(torch.eye(K, dtype=torch.float16)).T
        # A zero of 0 cannot be stored by the gptq layers: what they make of it is what counts.
        assert torch.equal(weight, wide) or "gptq" in packing, case
        config = {"quant_method": "auto-round", "packing_format": packing, "bits": bits, "group_size": size}
        tensors = {f"m.{name}": getattr(made, name) for name in held}
        golden.add(case, tensors, config | {"sym": symmetric, "data_type": "int"}, weight)
    return golden
