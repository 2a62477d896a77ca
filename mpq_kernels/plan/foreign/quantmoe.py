"""QuantMoE-Bench: strings such as main_2.attn_4.exp_l1e3_16.layer_16_4.keyword__gate_proj__4.

The words of its Mixtral program, in the order in which they apply, whatever their order in the string:

    main_B                experts, and attention unless attn_ is given (required)
    attn_B                q, k, v, o
    exp_l<L>e<E>_B        expert E of layer L
    layer_<L>_B           all experts of layer L
    keyword__<TEXT>__B    every linear so far whose name contains TEXT

Its DeepSeek program knows whole strings only (WHOLE). Source: https://github.com/UNITES-Lab/moe-quantization,
quantize_gptq_mixtral.py and quantize_gptq_deepseek.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...files.strict import close_names, short
from .documents import Document
from .draft import Draft, Wanted, layer_of
from .options import Options

GROUP = 128  # --group_size of both programs
MAX_CHARS = 200_000  # a word for every expert of 48 layers of 128 takes about 100,000
ATTENTION = re.compile(r"self_attn\.[qkvo]_proj")
SHARED = re.compile(r"mlp\.shared_experts?\.(gate|up|down)_proj")
DENSE = re.compile(r"mlp\.(gate|up|down)_proj")
# string -> bits of routed experts, of shared experts, of attention and dense layers: as the program has them
WHOLE = {
    "all_2": (2, 2, 2),
    "all_4": (4, 4, 4),
    "all_8": (8, 8, 8),
    "moe.all_mlp.2+other_block.4": (2, 2, 4),
    "moe.all_mlp.4+other_block.8": (4, 4, 8),
    "moe.shared_4.other.2+other_block_4": (2, 4, 4),
    "moe.shared_2.other.4+other_block_4": (4, 2, 4),
    "moe.shared_4.other.2+other_block.8": (4, 2, 8),
    "moe.shared_2.other.4+other_block.8": (2, 4, 8),
}
SWAPPED = tuple(text for text in WHOLE if text.endswith("+other_block.8") and ".shared_" in text)
WORDS = {
    "main": re.compile(r"main_(\d+)"),
    "attn": re.compile(r"attn_(\d+)"),
    "exp": re.compile(r"exp_l(\d{1,6})e(\d{1,6})_(\d+)"),
    "layer": re.compile(r"layer_(\d{1,6})_(\d+)"),
    "keyword": re.compile(r"keyword__(\w+)__(\d+)"),
}
FORMS = "main_B, attn_B, exp_l<L>e<E>_B, layer_<L>_B, keyword__<TEXT>__B"
Use = tuple[str, tuple[str, ...]]  # where a word stands, and its parts
Found = dict[str, list[Use]]  # kind of word -> every use of it


def is_quantmoe(document: Document) -> bool:
    """Whether a text begins like one of the strings."""
    text = document.value
    return document.kind == "text" and (
        text in WHOLE or text.startswith("moe.") or bool(re.match(r"(main|attn)_\d", text))
    )


def read_quantmoe(document: Document, draft: Draft, options: Options) -> None:
    """Widths by the structure of the model. Raises PlanError that names an unknown word and its place."""
    text = document.value
    if len(text) > MAX_CHARS:
        raise draft.fail("the whole", f"a string of {len(text)} characters, more than {MAX_CHARS}")
    group = draft.group(GROUP if options.group_size is None else options.group_size, "group_size")
    if not any(spec.expert is not None for spec in draft.specs.values()):
        raise draft.fail("the whole", "is about experts, and the model has none that can be packed")
    bits = _whole(draft, text) if text in WHOLE or text.startswith(("moe.", "all_")) else _words(draft, text)
    for name, width in bits.items():
        draft.want(name, Wanted(width, group))
    if options.group_size is None:
        draft.note("reinterpreted", f"the string has no group size: {GROUP}, the default of its programs")


def _whole(draft: Draft, text: str) -> dict[str, int]:
    if text not in WHOLE:
        raise draft.fail(
            f"word 1 at character 0, {short(text)}",
            f"the DeepSeek program knows no such string{close_names(text, list(WHOLE))}; it knows {', '.join(WHOLE)}",
        )
    experts, shared, other = WHOLE[text]
    if text in SWAPPED:
        draft.note(
            "reinterpreted",
            f"as the released program does it, and against the words of the string: routed experts {experts} bits, "
            f"shared experts {shared} bits",
        )
    out = {}
    for name, spec in draft.specs.items():
        inside = layer_of(name)
        if spec.expert is not None:
            out[name] = experts
        elif inside is not None and SHARED.fullmatch(inside[1]):
            out[name] = shared
        elif inside is not None and (ATTENTION.fullmatch(inside[1]) or DENSE.fullmatch(inside[1])):
            out[name] = other
    return out


def _words(draft: Draft, text: str) -> dict[str, int]:
    found = _parse(draft, text)
    if not found["main"]:
        raise draft.fail("the whole", "main_B, the width of all experts, is missing; it is required")
    main = _bits(draft, found["main"][0], single=True)
    attention = _bits(draft, found["attn"][0], single=True) if found["attn"] else main
    out = {}
    for name, spec in draft.specs.items():
        inside = layer_of(name)
        if spec.expert is not None:
            out[name] = main
        elif inside is not None and ATTENTION.fullmatch(inside[1]):
            out[name] = attention

    experts = {name: place for name in out if (place := _expert(draft, name)) is not None}
    of_layer: dict[int, list[str]] = {}
    of_expert: dict[tuple[int, int], list[str]] = {}
    for name, (layer, expert) in experts.items():
        of_layer.setdefault(layer, []).append(name)
        of_expert.setdefault((layer, expert), []).append(name)

    def put(use: Use, names: list[str]) -> None:
        if not names:
            raise draft.fail(use[0], "there is no such thing in the model among attention and experts")
        out.update(dict.fromkeys(names, _bits(draft, use)))

    for use in found["exp"]:
        put(use, of_expert.get((int(use[1][0]), int(use[1][1])), []))
    for use in found["layer"]:
        put(use, of_layer.get(int(use[1][0]), []))
    for use in found["keyword"]:
        put(use, [name for name in out if use[1][0] in name])
    return out


def _parse(draft: Draft, text: str) -> Found:
    found: Found = {word: [] for word in WORDS}
    for number, (start, word) in enumerate(_split(text), start=1):
        place = f"word {number} at character {start}, {short(word)}"
        kind = next((kind for kind, form in WORDS.items() if form.fullmatch(word)), None)
        if kind is None:
            raise draft.fail(place, f"is not a word of this format; it knows {FORMS}")
        match = WORDS[kind].fullmatch(word)
        assert match is not None
        if kind in ("main", "attn") and found[kind]:
            raise draft.fail(place, f"{kind}_ was already given: {found[kind][0][0]}")
        found[kind].append((place, match.groups()))
    return found


def _split(text: str) -> Iterator[tuple[int, str]]:
    start = 0
    for word in text.split("."):
        yield start, word
        start += len(word) + 1


def _bits(draft: Draft, use: Use, single: bool = False) -> int:
    """The width at the end of a word. single: the program reads one digit here, so that 16 would be 1."""
    place, parts = use
    digits = parts[-1]
    if single and len(digits) != 1:
        raise draft.fail(place, "this word takes one digit; the program would read its first digit alone")
    return draft.bits(int(digits) if len(digits) < 10 else digits, place)


def _expert(draft: Draft, name: str) -> tuple[int, int] | None:
    """(layer, expert) of the linear of an expert."""
    part, inside = draft.specs[name].expert, layer_of(name)
    return None if part is None or inside is None else (inside[0], part.index)
