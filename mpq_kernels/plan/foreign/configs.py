"""What the quantization configs of other libraries have in common: JSON objects, alone or inside a config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...files.strict import close_names, short
from .documents import Document
from .draft import Draft

INSIDE = "quantization_config"  # the key of a config.json


def config_of(document: Document) -> dict[str, Any]:
    """The config itself: the whole object, or what a config.json holds. Empty when it is no object."""
    value = document.value
    if document.kind != "json" or not isinstance(value, dict):
        return {}
    inside = value.get(INSIDE)
    return inside if isinstance(inside, dict) else value


def method_of(config: Mapping[str, Any]) -> Any:
    """What the config calls its method; None when it does not say."""
    return config.get("quant_method", config.get("method"))


def table(draft: Draft, value: Any, place: str) -> dict[str, Any]:
    """An object; null counts as an empty one. Raises PlanError."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise draft.fail(place, f"{short(value)} is not an object")
    return value


def names(draft: Draft, value: Any, place: str) -> list[str]:
    """A list of strings; null counts as an empty one. Raises PlanError."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise draft.fail(place, f"{short(value)} is not a list of names")
    return value


def required(draft: Draft, config: Mapping[str, Any], key: str) -> Any:
    """The value of a key that must be there. Raises PlanError."""
    if key not in config:
        raise draft.fail(key, f"is missing{close_names(key, [str(name) for name in config])}")
    return config[key]


def note_dropped(draft: Draft, place: str, config: Mapping[str, Any], taken: Collection[str]) -> None:
    """Note the keys that have a value and are not taken."""
    dropped = sorted(key for key, value in config.items() if key not in taken and value not in (None, False, [], {}))
    if dropped:
        draft.note("dropped", f"{place}: {', '.join(map(short, dropped))}, which say nothing about widths or groups")
