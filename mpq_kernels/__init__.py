"""Packed mixed-precision weights for Hugging Face models, and the kernels that multiply by them.

    plan  = mpq.Plan.uniform("model_dir", bits=3, group_size=64)
    mpq.pack("model_dir", "out_dir", plan)
    model = mpq.load("out_dir")

Importing this package also makes `AutoModelForCausalLM.from_pretrained` understand packed directories.
"""

from .errors import CheckpointError, FormatError, MPQError, PlanError, QuantizeError, UnsupportedError
from .linear import MixedLinear
from .model import load
from .pack import pack
from .plan import Plan
from .replace import replace_linears
from .version import VERSION as __version__

__all__ = [
    "CheckpointError",
    "FormatError",
    "MPQError",
    "MixedLinear",
    "Plan",
    "PlanError",
    "QuantizeError",
    "UnsupportedError",
    "__version__",
    "load",
    "pack",
    "replace_linears",
]
