"""compressed-tensors 0.17, in a folder of its own: other words for 3, 5, 6 and 7 bits, and columns in any order."""

from __future__ import annotations

import sys
from pathlib import Path

from . import Golden

# case -> format, bits, symmetric, group size, order of the columns
CASES = {
    **{f"{bits} bits": ("pack-quantized", bits, True, 32, None) for bits in (3, 4, 5, 6, 7)},
    **{f"{bits} bits asymmetric": ("pack-quantized", bits, False, 32, None) for bits in (3, 5, 6, 7)},
    "4 bits in groups of any columns": ("pack-quantized", 4, False, 16, "group"),
    "4 bits with an order that is not stored": ("pack-quantized", 4, True, 16, "weight"),
    "int8 in groups of any columns": ("naive-quantized", 8, True, 32, "group"),
}


def make() -> Golden:
    """Every case."""
    sys.path.insert(0, str(Path(sys.prefix) / "old"))
    lead = ("compressed_tensors", f"{__package__}.compressed_tensors")
    for name in [name for name in sys.modules if name.startswith(lead) and name != __name__]:
        del sys.modules[name]
    import compressed_tensors
    import torch

    from .compressed_tensors import NaiveQuantizationCompressor, PackedQuantizationCompressor, layer

    assert compressed_tensors.__version__.startswith("0.17.")
    golden = Golden()
    for seed, (case, (form, bits, symmetric, size, order)) in enumerate(CASES.items()):
        compressors = (PackedQuantizationCompressor, NaiveQuantizationCompressor)
        golden.add(case, *layer(seed, form, bits, symmetric, size, torch.float16, *compressors, order))
    return golden
