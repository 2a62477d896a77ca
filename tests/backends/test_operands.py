"""Arguments of operators that are written in Python: tensors of one device, told before anything is computed."""

import pytest
import torch

from mpq_kernels import FormatError
from mpq_kernels.backends import BACKENDS
from mpq_kernels.format import reference
from mpq_kernels.format.words import pack_weight
from tests.made.weights import random_weight

PACKED = pack_weight(random_weight(10, 64, 4, 64, "float", permuted=True))
WEIGHT = {"qweight": PACKED.qweight, "scales": PACKED.scales, "zeros": PACKED.zeros, "perm": PACKED.perm}
SHAPE = {"segments": PACKED.layout.segment_ints(), "out_features": 10, "in_features": 64}
X, BIAS = torch.randn(3, 64).half(), torch.randn(10)
CALLS = {
    "linear": {"x": X, "bias": BIAS},
    "grouped": {"x": X, "bias": BIAS, "offsets": torch.tensor([0, 1, 3], dtype=torch.int32)},
    "embedding": {"ids": torch.tensor([1, 2]), "dtype": torch.float16},
    "dequantize": {"dtype": torch.float16},
}


@pytest.mark.parametrize(
    ("operator", "name"),
    [(op, n) for op, call in CALLS.items() for n, t in (WEIGHT | call).items() if isinstance(t, torch.Tensor)],
)
def test_a_tensor_of_another_device_is_refused(monkeypatch, operator, name):
    call = WEIGHT | SHAPE | CALLS[operator]
    run = getattr(BACKENDS["reference"], operator)
    assert run(**call).isfinite().all()
    monkeypatch.setattr(reference, "dequantize", None)  # nothing is computed before
    other = "scales" if name == "qweight" else name
    with pytest.raises(FormatError, match=f"{other} is on (meta|cpu), qweight on (cpu|meta)"):
        run(**call | {name: call[name].to("meta")})
