"""`resize_token_embeddings` of a packed model: as transformers does it, but for a packed output head, which is refused.

transformers would find that out when the input embedding has its new size already.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..dense.towers import output_head
from ..errors import UnsupportedError

RESIZE = "resize_token_embeddings"


def guard_resizing(model: Any) -> None:
    """Refuse another number of tokens where the head, or the embedding, is packed; by an attribute of this model."""
    head, embedding = output_head(model), _embedding(model)
    packed = [module for module in (head, embedding) if hasattr(module, "packed")]
    if packed and embedding is not None:
        names = [name for name, module in model.named_modules() if any(module is each for each in packed)]
        setattr(model, RESIZE, partial(_resize, model, " and ".join(names)))


def _embedding(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # a model without any
        return None


def _resize(
    model: Any,
    names: str,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Module:
    """The embedding where its number of tokens stays. Raises UnsupportedError for another number."""
    embedding: Any = model.get_input_embeddings()
    held = embedding.weight.shape[0]
    wanted = held if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted != held:
        raise UnsupportedError(
            f"{names} is packed with {held} tokens and cannot be resized to {wanted}: resize the dense model and pack "
            "that, pack with the head kept (lm_head=16), or make this model dense (model.dequantize())"
        )
    found: nn.Module = embedding
    return found
