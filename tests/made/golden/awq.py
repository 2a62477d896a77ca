"""AutoAWQ: words in its gemm and gemv layouts, dequantized by its own `dequantize_gemm`."""

from __future__ import annotations

import sys
import types

import torch

# Its package needs an old transformers to be imported whole; the files below need nothing of it.
sys.modules["awq"] = types.ModuleType("awq")
sys.modules["awq"].__path__ = [f"{path}/awq" for path in sys.path if path.endswith("site-packages")]

from awq.modules.linear.gemm import WQLinear_GEMM  # noqa: E402
from awq.modules.linear.gemv import WQLinear_GEMV  # noqa: E402
from awq.utils.packing_utils import dequantize_gemm  # noqa: E402

from . import Golden  # noqa: E402

N, K = 32, 128
# case -> layout, group size, zero points
CASES = {
    "gemm": ("gemm", 32, True),
    "gemm, one group": ("gemm", -1, True),
    "gemm symmetric": ("gemm", 64, False),
    "gemv": ("gemv", 32, True),
    "gemv symmetric": ("gemv", 64, False),
}


def make() -> Golden:
    """Every case."""
    golden = Golden()
    for seed, (case, (form, group, zero_points)) in enumerate(CASES.items()):
        rng = torch.Generator().manual_seed(seed)
        size = K if group == -1 else group
        codes = torch.randint(0, 16, (N, K), generator=rng)
        scales = (torch.rand(N, K // size, generator=rng) * 0.02 + 0.001).half()
        zeros = torch.randint(0, 16, scales.shape, generator=rng) if zero_points else torch.full(scales.shape, 8)
        wide = ((codes - zeros.repeat_interleave(size, 1)) * scales.float().repeat_interleave(size, 1)).half()
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.data = wide.float()
        made = {
            name: cls.from_linear(
                linear, 4, size, False, *(each.T.contiguous() if name == "gemm" else each for each in (scales, zeros))
            )
            for name, cls in (("gemm", WQLinear_GEMM), ("gemv", WQLinear_GEMV))
        }
        gemm = made["gemm"]
        weight = dequantize_gemm(gemm.qweight, gemm.qzeros, gemm.scales, 4, size).T
        assert torch.equal(weight, wide)
        tensors = {f"m.{name}": getattr(made[form], name) for name in ("qweight", "qzeros", "scales")}
        config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": form}
        golden.add(case, tensors, config, weight)
    return golden
