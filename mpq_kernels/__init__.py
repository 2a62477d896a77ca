"""Packed mixed-precision weights for Hugging Face models, and the kernels that multiply by them.

    plan  = mpq.Plan.uniform("model_dir", bits=3, group_size=64)
    mpq.pack("model_dir", "out_dir", plan)
    model = mpq.load("out_dir")

Importing this package also makes `AutoModelForCausalLM.from_pretrained` understand packed directories. Names are loaded
when they are first used, so that the import itself costs nothing and asks nothing of the machine.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, FormatError, MPQError, PlanError, QuantizeError, UnsupportedError
from .hf import register
from .version import VERSION as __version__

if TYPE_CHECKING:
    from .backends.cuda import warmup
    from .calibrate.calibration import Calibration
    from .exports.convert import export_checkpoint
    from .imports.convert import import_checkpoint
    from .imports.load import load
    from .nn.linear import MixedLinear
    from .nn.replace import replace_linears
    from .packer.pack import pack
    from .plan.plan import Plan

_LAZY = {
    "Calibration": "calibrate.calibration",
    "MixedLinear": "nn.linear",
    "Plan": "plan.plan",
    "export_checkpoint": "exports.convert",
    "import_checkpoint": "imports.convert",
    "load": "imports.load",
    "pack": "packer.pack",
    "replace_linears": "nn.replace",
    "warmup": "backends.cuda",
}

__all__ = [
    "Calibration",
    "CheckpointError",
    "FormatError",
    "MPQError",
    "MixedLinear",
    "Plan",
    "PlanError",
    "QuantizeError",
    "UnsupportedError",
    "__version__",
    "export_checkpoint",
    "import_checkpoint",
    "load",
    "pack",
    "replace_linears",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


register.register_on_import()
