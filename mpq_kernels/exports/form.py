"""What a target says of a packed directory before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..files.safetensors import Spec
from .source import Linear


@dataclass(frozen=True, eq=False)
class Form:
    """specs: linear -> the tensors that are written for it, with their full names, but for its bias.

    make: makes them. says: linear -> how it is stored, for reports. config: what is added to config.json. kept: the
    dtype that a kept tensor of the given one has in the output. notes: what programs that read it may ask for.
    """

    specs: Mapping[str, dict[str, Spec]]
    make: Callable[[Linear], dict[str, torch.Tensor]]
    says: Mapping[str, str]
    config: Mapping[str, Any]
    kept: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype
    notes: tuple[str, ...] = field(default=())
