"""Which linears of a model do not read text: its vision and audio towers, and the projectors behind them.

    vision_tower --> projector --> language_model --> lm_head
    tower            tower         language           head

transformers names the modules that read and write text (LANGUAGE), and its classes say what they read
(`input_modalities`). Both are needed: some vision towers do not say it, and some models have no module of such a name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .kinds import is_linear

LANGUAGE = ("language_model", "text_model", "text_decoder", "decoder")
OTHER_SENSES = ("vision", "visual", "image", "video", "audio", "speech", "perceiver", "projector", "connector")
TEXT = "text"


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes the logits of tokens: the model's, or that of a language model inside of it."""
    for module in model.modules():
        head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None  # type: ignore[operator]
        if head is not None:
            return head
    return None


def towers(model: nn.Module) -> set[str]:
    """Names of the linears outside of the parts that read or write text; none of a model without such a part."""
    head = output_head(model)
    if _reads(model) == {TEXT} or (head is None and TEXT not in _reads(model)):
        return set()
    language = set(_language_linears("", model))
    return {
        name
        for name, module in model.named_modules()
        if is_linear(module) and module is not head and name not in language
    }


def _reads(model: Any) -> set[str]:
    """What a module of transformers takes: "text", "image", "video", "audio"; text where it does not say."""
    found = getattr(model, "input_modalities", TEXT)
    return {found} if isinstance(found, str) else set(found)


def _language_linears(name: str, model: Any) -> Iterator[str]:
    """Names of the linears that read or write text, in a model that is called `name` in the whole."""
    children = dict(model.named_children())
    roots = {child: children[child] for child in LANGUAGE if child in children}
    if roots:
        encoder = children.get("encoder")
        for child, module in roots.items():
            yield from _linears(_join(name, child), module)
        if encoder is not None and TEXT in _reads(encoder) and getattr(encoder, "main_input_name", "") == "input_ids":
            yield from _language_linears(_join(name, "encoder"), encoder)
        return
    nested = _nearest_models(model)
    base = getattr(model, "base_model_prefix", None)  # inside, a base model may say less than it does
    reading = {child: module for child, module in nested.items() if TEXT in _reads(module) or child == base}
    for child, module in reading.items():
        yield from _language_linears(_join(name, child), module)
    if reading:
        return
    other = {child.partition(".")[0] for child in nested}
    for child, module in children.items():
        if child not in other and not any(word in child for word in OTHER_SENSES):
            yield from _linears(_join(name, child), module)


def _nearest_models(model: nn.Module) -> dict[str, nn.Module]:
    """The models inside of a model, by name, without those that lie inside of others."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if name and not inside and hasattr(module, "input_modalities"):
            found[name] = module
    return found


def _linears(name: str, module: nn.Module) -> Iterator[str]:
    yield from (_join(name, each) for each, linear in module.named_modules() if is_linear(linear))


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
