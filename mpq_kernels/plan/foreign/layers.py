"""Plans by number of the layer: SliM-LLM's widths of column groups and MC-MoE's widths of experts.

    slim-llm   {0: {"self_attn.q_proj": [2, 2, 3, 1, ...], ...}, ...}    one width for each 128 columns
    mc-moe     {0: {0: 2, 1: 3, ...}, ...}                               {block: {expert: bits}}

Both are written by torch.save or pickle; JSON is read too, where the numbers are strings. Sources:
https://github.com/Aaronhuang-778/SliM-LLM (slim-llm/run.py), https://github.com/Aaronhuang-778/MC-MoE (main.py).
"""

from __future__ import annotations

import re
from typing import Any

from ...files.strict import close_names, short
from ...format.codes import KEPT_BITS, TILE_K
from .documents import Document
from .draft import Draft, Wanted, layer_of
from .options import Options

GROUP = 128  # --groupsize of both programs
MAX_NUMBERS = 10**6  # of one tensor
ATTENTION_BITS = 4  # of the MC-MoE paper
ATTENTION = re.compile(r"self_attn\.[qkvo]_proj")


def is_slim(document: Document) -> bool:
    """Whether a file maps numbers to tables of lists."""
    return _nested(
        document, lambda key: isinstance(key, str) and not key.isdigit(), lambda v: not isinstance(v, (int, dict))
    )


def is_mc_moe(document: Document) -> bool:
    """Whether a file maps numbers to tables of numbers to widths."""
    return _nested(document, _is_number, lambda value: isinstance(value, int))


def read_slim(document: Document, draft: Draft, options: Options) -> None:
    """Segments of columns. Raises PlanError."""
    group = GROUP if options.group_size is None else options.group_size
    if group < TILE_K or group % TILE_K:
        raise draft.fail("group_size", f"{group} is not a multiple of {TILE_K}, at which columns can be cut")
    places = {layer_of(name): name for name in draft.specs}
    ones = []
    for layer, modules in _numbered(draft, document.value, "layer").items():
        for module, widths in _items(draft, modules, f"layer {layer}"):
            place = f"layer {layer}, {module}"
            name = places.get((layer, module))
            if name is None:
                inside = [inner[1] for inner in places if inner is not None and inner[0] == layer]
                raise draft.fail(place, f"the model has no such linear{close_names(module, inside)}")
            columns = tuple(draft.bits(v, f"{place}[{i}]") for i, v in enumerate(_list(draft, widths, place)))
            k = draft.spec(name).in_features
            if len(columns) != -(-k // group):
                raise draft.fail(
                    place,
                    f"{len(columns)} widths, and K={k} has {-(-k // group)} groups of {group} columns; is the "
                    "file for another model, or made with another group size (group_size=, --group-size)?",
                )
            if KEPT_BITS in columns:
                raise draft.fail(place, f"a group of columns cannot be kept in {KEPT_BITS} bits")
            draft.want(name, Wanted(max(columns), group, columns=columns))
            ones += [name] if 1 in columns else []
    draft.note("reinterpreted", f"neighbouring groups of {group} columns with the same width are one segment")
    if ones:
        draft.note(
            "reinterpreted",
            "SliM-LLM stores its groups of 1 bit in 2 bits, as sign times scale plus a mean; here they take one bit "
            "and are symmetric, so files are smaller and the means are gone",
            ones,
        )


def read_mc_moe(document: Document, draft: Draft, options: Options) -> None:
    """Widths of experts, and one for attention. Raises PlanError."""
    group = draft.group(GROUP if options.group_size is None else options.group_size, "group_size")
    attention = ATTENTION_BITS if options.attention_bits is None else options.attention_bits
    draft.bits(attention, "attention_bits")
    experts: dict[tuple[int, int], list[str]] = {}
    for name, spec in draft.specs.items():
        inside = layer_of(name)
        if spec.expert is not None and inside is not None:
            experts.setdefault((inside[0], spec.expert.index), []).append(name)
        elif inside is not None and ATTENTION.fullmatch(inside[1]):
            draft.want(name, Wanted(attention, group))
    if not experts:
        raise draft.fail("the whole", "is a table of experts, and the model has none that can be packed")
    seen = set()
    for block, table in _numbered(draft, document.value, "block").items():
        for expert, bits in _numbered(draft, table, "expert", f"block {block}: ").items():
            place = f"block {block}, expert {expert}"
            if (block, expert) not in experts:
                blocks = sorted({layer for layer, _ in experts})
                count = 1 + max(index for _, index in experts)
                raise draft.fail(place, f"the model has none; it has experts 0..{count - 1} in blocks {_span(blocks)}")
            seen.add((block, expert))
            for name in experts[block, expert]:
                draft.want(name, Wanted(draft.bits(_plain(bits), place), group))
    missing = sorted(set(experts) - seen)
    if missing:
        raise draft.fail(
            f"block {missing[0][0]}",
            f"expert {missing[0][1]} has no width, nor have {len(missing) - 1} others; "
            "MC-MoE's tables name all experts of all blocks: is it for another model?",
        )
    chosen = "MC-MoE's default" if options.attention_bits is None else "as chosen"
    draft.note("reinterpreted", f"the file is about experts alone: q, k, v and o get {attention} bits ({chosen})")
    draft.note("changed", f"routers stay in {KEPT_BITS} bits; MC-MoE's program gives them the bits of attention")


def _nested(document: Document, inner_key: Any, leaf: Any) -> bool:
    value = document.value
    if document.kind not in ("json", "torch") or not isinstance(value, dict) or not value:
        return False
    if not all(_is_number(key) and isinstance(table, dict) for key, table in value.items()):
        return False
    pairs = [pair for table in value.values() for pair in table.items()]
    return bool(pairs) and all(inner_key(key) and leaf(item) for key, item in pairs)


def _is_number(key: Any) -> bool:
    return type(key) is int or (isinstance(key, str) and key.isascii() and key.isdigit())


def _numbered(draft: Draft, value: Any, what: str, before: str = "") -> dict[int, Any]:
    """A table whose keys are numbers; JSON has them as strings."""
    if not isinstance(value, dict) or not value:
        raise draft.fail(f"{before}the whole", f"{short(value)} is not a table of {what}s")
    out: dict[int, Any] = {}
    for key, item in value.items():
        if not _is_number(key) or len(str(key)) > 9:
            raise draft.fail(f"{before}{what} {short(key)}", f"is not the number of a {what}")
        if int(key) in out:
            raise draft.fail(f"{before}{what} {int(key)}", "appears twice")
        out[int(key)] = item
    return out


def _items(draft: Draft, value: Any, place: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise draft.fail(place, f"{short(value)} is not a table of module names")
    return list(value.items())


def _list(draft: Draft, value: Any, place: str) -> list[Any]:
    """A list of widths; a tensor of whole numbers is one too."""
    if not isinstance(value, (list, tuple)) and hasattr(value, "numel"):
        if not _has_numbers(value) or value.dim() != 1 or value.is_floating_point() or value.is_complex():
            raise draft.fail(place, f"a tensor of shape {list(value.shape)} and {value.dtype} is no list of widths")
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or not value:
        raise draft.fail(place, f"{short(value)} is not a list of widths")
    return [_plain(item) for item in value]


def _plain(value: Any) -> Any:
    """A number out of a tensor of no dimensions; anything else as it is."""
    return value.item() if hasattr(value, "numel") and _has_numbers(value) and value.dim() == 0 else value


def _has_numbers(tensor: Any) -> bool:
    """Whether a tensor of a hostile file is a plain one of a size that can be looked at."""
    return tensor.device.type == "cpu" and "strided" in str(tensor.layout) and tensor.numel() <= MAX_NUMBERS


def _span(numbers: list[int]) -> str:
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}..{numbers[-1]}" if whole else ", ".join(map(str, numbers[:10]))
