"""Plans that are a table of module names: MixDQ's YAML and ShiftAddLLM's JSON.

    mixdq         model.layers.0.mlp.up_proj: 4
    shiftaddllm   {"model.layers.0.mlp.up_proj": {"bits": 3, "columnwise": true}}

Sources: https://github.com/thu-nics/MixDQ (kernels/cfgs/weight), https://github.com/GATECH-EIC/ShiftAddLLM
(sensitivity/mixbit, model/opt.py).
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from ...files.strict import close_names, short
from .documents import Document
from .draft import Draft, Wanted
from .options import Options

WRAPPER = "model."  # MixDQ names modules from its own wrapper, which holds the model as `model`
MIXDQ_GROUP = -1  # its quantizer has one range for each row ("channel_wise")
SHIFTADD_GROUP = 64  # our default: binary coding with one scale for each row and bit has no groups of columns


def is_mixdq(document: Document) -> bool:
    """Whether a YAML file maps names to whole numbers."""
    return document.kind == "yaml" and _maps(document.value, lambda value: type(value) is int)


def is_shiftaddllm(document: Document) -> bool:
    """Whether a JSON file maps names to objects with the two keys."""
    return document.kind == "json" and _maps(
        document.value, lambda value: isinstance(value, dict) and {"bits", "columnwise"} == set(value)
    )


def read_mixdq(document: Document, draft: Draft, options: Options) -> None:
    """Widths of weights, for exact names. Raises PlanError."""
    path = PurePath(document.where)
    if path.stem.startswith("act_") or path.parent.name == "act":
        raise draft.fail(
            "the whole",
            "MixDQ keeps the widths of activations in such a file, and this package quantizes weights alone; give the "
            "file of the weights (weight_*.yaml), or rename this one if it holds them",
        )
    table = _table(draft, document.value)
    if not any(name in draft.specs for name in table):
        inner = {name.removeprefix(WRAPPER): value for name, value in table.items() if name.startswith(WRAPPER)}
        if len(inner) == len(table) and any(name in draft.specs for name in inner):
            draft.note("reinterpreted", f"names begin with MixDQ's wrapper {WRAPPER!r}, which was taken off")
            table = inner
    group = draft.group(MIXDQ_GROUP if options.group_size is None else options.group_size, "group_size")
    for name, value in table.items():
        draft.want(name, Wanted(draft.bits(value, name), group))
    if options.group_size is None:
        draft.note("reinterpreted", "the file has no group sizes: one scale for each row, as in MixDQ's quantizer")


def read_shiftaddllm(document: Document, draft: Draft, options: Options) -> None:
    """Widths alone. Raises PlanError."""
    table = _table(draft, document.value)
    group = draft.group(SHIFTADD_GROUP if options.group_size is None else options.group_size, "group_size")
    for name, value in table.items():
        if not isinstance(value, dict):
            raise draft.fail(name, f'{short(value)} is not an object such as {{"bits": 3, "columnwise": true}}')
        unknown = set(value) - {"bits", "columnwise"}
        if unknown or "bits" not in value:
            key = min(map(str, unknown), default="bits")
            why = close_names(key, ("bits", "columnwise")) if unknown else " is missing"
            raise draft.fail(name, f"key {short(key)}{' is unknown' if unknown else ''}{why}")
        draft.flag(value.get("columnwise", False), f"{name}.columnwise")
        draft.want(name, Wanted(draft.bits(value["bits"], f"{name}.bits"), group))
    draft.note(
        "reinterpreted",
        "only the widths are taken: ShiftAddLLM's q bits are a sum of q signs with shifted scales, not codes times a "
        f"scale; here each weight has 2**bits equal steps and zero points, in groups of {group} columns",
    )
    draft.note("dropped", "columnwise chooses between two forms of scales that this package does not have")


def _maps(value: Any, each: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(k, str) and each(v) for k, v in value.items())


def _table(draft: Draft, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise draft.fail("the whole", f"{short(value)} is not a table of module names")
    for name in value:
        if not isinstance(name, str):
            raise draft.fail(short(name), "is not the name of a module")
    return value
