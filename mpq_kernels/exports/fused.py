"""Linears that servers fuse, which must then be alike: vLLM and SGLang ask for one scheme of q, k, v and gate, up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .source import PackedSource

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def unlike(source: PackedSource, shapes: Mapping[str, Any]) -> tuple[str, ...]:
    """A note where such linears are not alike; () otherwise."""
    dense = {**dict.fromkeys(source.checkpoint.packing.kept, None), **shapes}
    groups: dict[tuple[str, tuple[str, ...]], list[Any]] = {}
    for name, shape in dense.items():
        parent, _, leaf = name.rpartition(".")
        for leaves in TOGETHER:
            if leaf in leaves:
                groups.setdefault((parent, leaves), []).append(shape)
    found = [(parent, leaves) for (parent, leaves), held in groups.items() if any(each != held[0] for each in held)]
    if not found:
        return ()
    parent, unequal = found[0]
    return (
        f"{', '.join(unequal)} of {parent} differ in width or group ({len(found)} such groups): transformers loads "
        "that, vLLM and SGLang, which fuse them, do not; `mpq plan allocate --granularity fuse` makes a plan that "
        "passes",
    )
