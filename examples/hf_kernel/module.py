"""Products with packed weights of 1 to 8 bits on the CPU, as operators torch.ops.mpq.*; a kernel of Hugging Face's hub.

    kernel = kernels.get_local_kernel(Path("build/hf-kernel"))
    y = kernel.linear(x, qweight, scales, zeros, perm, bias, segments, out_features, in_features)

The tensors and the table of segments are those of a packed directory. Packing, loading whole models, and tracing by
torch.compile are in the package mpq_kernels; where that is imported too, its operators are these.
"""

from pathlib import Path

import torch

if not hasattr(torch.ops.mpq, "layout_id"):
    torch.ops.load_library(str(Path(__file__).with_name("_ops.so")))

linear = torch.ops.mpq.linear
linear_int8 = torch.ops.mpq.linear_int8
grouped_linear = torch.ops.mpq.grouped_linear
grouped_linear_int8 = torch.ops.mpq.grouped_linear_int8
dequantize = torch.ops.mpq.dequantize
embedding = torch.ops.mpq.embedding
layout_id = torch.ops.mpq.layout_id

__all__ = [
    "dequantize",
    "embedding",
    "grouped_linear",
    "grouped_linear_int8",
    "layout_id",
    "linear",
    "linear_int8",
]
