"""What a packed directory can be written as: a target is one row and one file."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import CheckpointError
from ..files.strict import close_names, short
from .awq import awq_form
from .bf16 import bf16_form
from .compressed import compressed_form
from .form import Form
from .gptq import gptq_form
from .mlx import mlx_form
from .source import PackedSource

TARGETS: dict[str, Callable[[PackedSource], Form]] = {
    "bf16": bf16_form,
    "compressed-tensors": compressed_form,
    "gptq": gptq_form,
    "awq": awq_form,
    "mlx": mlx_form,
}


def check_target(name: str) -> None:
    """Raise CheckpointError unless there is such a target."""
    if name not in TARGETS:
        raise CheckpointError(f"to={short(name)} is not one of {', '.join(TARGETS)}{close_names(name, [*TARGETS])}")
