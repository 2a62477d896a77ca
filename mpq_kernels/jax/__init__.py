"""Packed weights in JAX: the kernels of the C interface as custom calls of XLA. Needs jax; see docs/plugging_in.md.

    weights = mpq_kernels.jax.load("out_dir")
    y = jax.jit(mpq_kernels.jax.linear)(x, weights["model.layers.0.mlp.down_proj"])

May import checkpoint, format, capi, errors. Nothing else imports it: `import mpq_kernels` never imports jax. The
handlers are compiled when they are first called (build.py).
"""

from ..errors import UnsupportedError

try:
    import jax.ffi  # noqa: F401
except ImportError as error:
    raise UnsupportedError(
        f"mpq_kernels.jax needs jax 0.7 or later (pip install 'mpq_kernels[jax]'), which cannot be imported: {error}"
    ) from error

from .operations import dequantize, embedding, grouped_linear, linear
from .weight import Weight, load

__all__ = ["Weight", "dequantize", "embedding", "grouped_linear", "linear", "load"]
