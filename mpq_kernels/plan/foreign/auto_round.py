"""auto-round: a quantization config with `extra_config`, an object of module names or regular expressions.

    {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": true, "data_type": "int",
     "block_name_to_quantize": "model.layers",
     "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8}, ".*v_proj.*": {"bits": 6}}}

Its rules, which differ from those of our plans: the linears of the named blocks (without names: of all layers) are
quantized; a key that is the name of a linear decides about it; any other key is an expression that may match anywhere
in a name (`search`), among those linears, or where it matches none of them among all; the first one wins. Keys that a
rule lacks are taken from the config.

Source: https://github.com/intel/auto-round, auto_round/inference/convert_model.py and utils.py, version 0.16.1.
"""

from __future__ import annotations

import os
from typing import Any

from ...files.strict import close_names, short
from ...format.codes import KEPT_BITS
from .configs import config_of, method_of, names, note_dropped, required, table
from .documents import Document
from .draft import Draft, Wanted, layer_of
from .options import Options
from .patterns import compile_patterns

METHODS = ("auto-round", "autoround", "intel/auto-round", None)
INTEGERS = ("int", "int_sym", "int_asym")
SCHEME = ("bits", "group_size", "sym", "data_type")
BLOCKS = ("block_name_to_quantize", "to_quant_block_names", "quant_block_list")
NAMED = (*SCHEME, *BLOCKS, "extra_config", "quant_method", "packing_format", "autoround_version")
OTHER_RULES = ("dynamic", "modules_in_block_to_quantize", "modules_to_not_convert")  # of gptq and awq exports
ROW_SCALE = -1
WHOLE_SCALE = 0  # auto-round's word for one scale for the whole weight


def is_auto_round(document: Document) -> bool:
    """Whether a JSON file is a config of auto-round."""
    config = config_of(document)
    named = method_of(config) in METHODS[:-1]
    return named or (method_of(config) is None and ("extra_config" in config or "autoround_version" in config))


def read_auto_round(document: Document, draft: Draft, options: Options) -> None:
    """Widths of the blocks, and of what extra_config names. Raises PlanError."""
    config = config_of(document)
    if method_of(config) not in METHODS:
        raise draft.fail(
            "quant_method", f"{short(method_of(config))} is not 'auto-round'; other methods have other formats"
        )
    for key in OTHER_RULES:
        if config.get(key):
            raise draft.fail(key, "more rules beside extra_config are not read; write them as extra_config")
    base = {"bits": required(draft, config, "bits"), "group_size": required(draft, config, "group_size")}
    base |= {"sym": config.get("sym", True), "data_type": config.get("data_type", "int")}
    extra = table(draft, config.get("extra_config"), "extra_config")
    rules = {key: table(draft, value, f"extra_config[{short(key)}]") for key, value in extra.items()}
    inside = _blocks(draft, config)
    chosen = _choose(draft, rules, inside)
    kept: list[str] = []
    for name in dict.fromkeys((*inside, *chosen)):
        place = f"extra_config[{short(chosen[name])}]" if name in chosen else "the config"
        rule = base | (rules[chosen[name]] if name in chosen else {})
        if _is_float(draft, rule, place, options):
            kept.append(name)
            rule = rule | {"bits": KEPT_BITS}
        draft.want(name, _wanted(draft, rule, place))
    if kept:
        draft.note("changed", f"a float type is kept in {KEPT_BITS} bits, as keep_floats asks", kept)
    for key, rule in rules.items():
        note_dropped(draft, f"extra_config[{short(key)}]", rule, SCHEME)
    note_dropped(draft, "the config", config, NAMED)


def _blocks(draft: Draft, config: dict[str, Any]) -> list[str]:
    """The linears of the blocks that are quantized: whose names begin as one of theirs."""
    said: Any = next((config[key] for key in BLOCKS if config.get(key)), None)
    if said is None:
        return [name for name, spec in draft.specs.items() if not spec.is_head and layer_of(name) is not None]
    if isinstance(said, str):
        starts = [part.strip() for part in said.split(",")]
    elif isinstance(said, list):
        each = [names(draft, part if isinstance(part, list) else [part], BLOCKS[0]) for part in said]
        starts = [os.path.commonprefix(part).rstrip(".") for part in each]
    else:
        raise draft.fail(BLOCKS[0], f"{short(said)} is neither text nor a list")
    found = [name for name in draft.specs if name.startswith(tuple(starts))]
    if not found:
        raise draft.fail(BLOCKS[0], f"no linear's name begins with {' or '.join(map(short, starts))}")
    return found


def _choose(draft: Draft, rules: dict[str, Any], inside: list[str]) -> dict[str, str]:
    """Linear -> the key that decides about it. Raises PlanError for a key that matches nothing."""
    chosen = {key: key for key in rules if key in draft.specs}
    regexes = [key for key in rules if key not in draft.specs]
    compiled = compile_patterns(draft, ((key, f"extra_config[{short(key)}]") for key in regexes))
    for key, pattern in zip(regexes, compiled, strict=True):
        place = f"extra_config[{short(key)}]"
        found = [n for n in inside if pattern.search(n)] or [n for n in draft.specs if pattern.search(n)]
        if not found and _is_kept(rules[key]):
            draft.note("dropped", f"{place} keeps what is no linear of the model that could be packed")
        elif not found:
            raise draft.fail(
                place, f"is not in the name of any linear of the model{close_names(key, list(draft.specs))}"
            )
        elif rules[key]:
            for name in found:
                chosen.setdefault(name, key)
    return chosen


def _is_kept(rule: dict[str, Any]) -> bool:
    return type(rule.get("bits")) is int and rule["bits"] >= KEPT_BITS


def _is_float(draft: Draft, rule: dict[str, Any], place: str, options: Options) -> bool:
    """Whether a rule asks for a float type that is to be kept. Raises PlanError for any other type than integers."""
    if _is_kept(rule) or rule["data_type"] in INTEGERS:
        return False
    if not options.keep_floats:
        raise draft.fail(
            f"{place}.data_type",
            f"{short(rule['data_type'])} is not a plain integer type ({', '.join(INTEGERS)}); this package has no "
            f"others. keep_floats (--keep-floats) keeps such weights in {KEPT_BITS} bits",
        )
    return True


def _wanted(draft: Draft, rule: dict[str, Any], place: str) -> Wanted:
    if _is_kept(rule) and rule["bits"] in (KEPT_BITS, 32):
        return Wanted(KEPT_BITS, ROW_SCALE)
    bits = draft.bits(rule["bits"], f"{place}.bits")
    group = rule["group_size"]
    if type(group) is int and group == WHOLE_SCALE:
        text = f"{place}: one scale for the whole weight becomes one for each row"
        if all(each.text != text for each in draft.notes):
            draft.note("reinterpreted", text)
        group = ROW_SCALE
    return Wanted(bits, draft.group(group, f"{place}.group_size"), draft.flag(rule["sym"], f"{place}.sym"))
