"""What is swept: a `Case` is one family as a tiny model, and a `Kind` a list of families that are made in one way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Changes = Mapping[str, Any]
Inputs = dict[str, Any]
VOCAB = 160
ROWS, TOKENS = 2, 12


def token_ids(config: Any) -> Inputs:
    """Two rows of random token ids, none of them special."""
    del config
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(10, 100, (ROWS, TOKENS), generator=generator)}


def copies(inputs: Inputs) -> Inputs:
    """The same with tensors that a model may write to."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def without_cache(config: Any) -> Inputs:
    """The same, for a model that cannot make a cache of its config."""
    return token_ids(config) | {"use_cache": False}


def logits(output: Any) -> torch.Tensor:
    """What two models are compared by."""
    found: torch.Tensor = output.logits
    return found


@dataclass(frozen=True)
class Case:
    """A family as a tiny random model.

    auto: name of the transformers class whose from_config makes it. changes: what its config differs in from the tiny
    one that shrink.py makes, by name; a dict for a config inside it. inputs: config -> keywords of forward. output:
    what forward returns -> the tensor that is compared. config: makes the tiny config where shrink.py cannot.
    """

    kind: str
    model_type: str
    auto: str
    changes: Changes = field(default_factory=dict)
    inputs: Callable[[Any], Inputs] = token_ids
    output: Callable[[Any], torch.Tensor] = logits
    config: Callable[[], Any] | None = None

    @property
    def name(self) -> str:
        """kind/model_type"""
        return f"{self.kind}/{self.model_type}"


@dataclass(frozen=True)
class Kind:
    """Families that are made in one way. title: for the page. cases: lists them all."""

    title: str
    cases: Callable[[], list[Case]]
