"""Packed modules as ONNX models. Needs onnx; running them needs onnxruntime. See docs/plugging_in.md.

    export_module(weight, bias)             one packed weight as a model: x (tokens, K) -> y (tokens, N)
    export_directory("out_dir", "onnx")     each packed module of a directory as <module>.onnx

May import checkpoint, format, capi, errors. `import mpq_kernels` never imports onnx.
"""

from ..errors import UnsupportedError

try:
    import onnx  # noqa: F401
except ImportError as error:
    raise UnsupportedError(
        f"mpq_kernels.onnx needs onnx (pip install 'mpq_kernels[onnx]'), which cannot be imported: {error}"
    ) from error

from .export import export_directory
from .graph import OPERATORS, export_module

__all__ = ["OPERATORS", "export_directory", "export_module"]
