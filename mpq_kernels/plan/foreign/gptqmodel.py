"""GPTQModel: quantize_config.json with `dynamic`, an object of regular expressions and what they override.

    {"bits": 4, "group_size": 128, "sym": true, "dynamic": {"+:.*\\\\.1[0-9]\\\\..*": {"bits": 8}, "-:.*down_proj": {}}}

Its rules, which differ from those of our plans: an expression must match at the beginning of a module's name, not the
whole (`match`); the first one in the file that matches decides, and no other is looked at; `-:` leaves the module as it
is, `+:` or nothing overrides; what it does not override is taken from the config. So the expressions are tried here on
the target's names, and the plan has exact ones. The head is quantized only under `lm_head`, routers never.

Source: https://github.com/ModelCloud/GPTQModel, gptqmodel/quantization/config.py (dynamic_get), version 7.7.0.
"""

from __future__ import annotations

import re
from typing import Any

from ...files.strict import close_names, short
from ...format.codes import KEPT_BITS
from .configs import config_of, method_of, note_dropped, required, table
from .documents import Document
from .draft import Draft, Wanted
from .options import Options
from .patterns import compile_patterns

METHODS = (None, "gptq")
TAKEN = ("bits", "group_size", "sym", "desc_act")
SAYS_METHOD = ("method", "quant_method", "format", "fmt")
GPTQ_FORMATS = ("gptq", "gptq_v2", "gptq_p", "marlin", "bitblas")
LITERAL = re.compile(r"\^((?:\w|-|\\\.)+)\$")  # one name, dots escaped: looked up, so that there may be any number
HEAD = {"bits": 8, "group_size": 32, "sym": True, "desc_act": False}  # what lm_head=true gets without a rule of its own


def is_gptqmodel(document: Document) -> bool:
    """Whether a JSON file is a config of GPTQ."""
    config = config_of(document)
    return "bits" in config and "group_size" in config and method_of(config) in METHODS and "extra_config" not in config


def read_gptqmodel(document: Document, draft: Draft, options: Options) -> None:
    """Widths of all linears of the layers. Raises PlanError."""
    config = config_of(document)
    if method_of(config) not in METHODS:
        raise draft.fail("quant_method", f"{short(method_of(config))} is not 'gptq'; other methods have other formats")
    base = {"bits": required(draft, config, "bits"), "group_size": required(draft, config, "group_size")}
    base |= {"sym": config.get("sym", True), "desc_act": config.get("desc_act", False)}
    rules = table(draft, config.get("dynamic"), "dynamic")
    for key, value in rules.items():
        _check_override(draft, key, table(draft, value, f"dynamic[{short(key)}]"))
    chosen = _first_matches(draft, rules)
    quantizes_head = draft.flag(config.get("lm_head", False), "lm_head")
    reordered, skipped, heads = [], [], []
    for name, spec in draft.specs.items():
        if spec.router or (spec.is_head and not quantizes_head):
            heads += [name] if name in chosen and not spec.router else []
            continue
        if name in chosen and chosen[name].startswith("-:"):
            draft.want(name, Wanted(KEPT_BITS, -1))
            skipped.append(name)
            continue
        place = f"dynamic[{short(chosen[name])}]" if name in chosen else "the config"
        rule = base | (rules[chosen[name]] or {}) if name in chosen else HEAD if spec.is_head else base
        draft.want(name, _wanted(draft, rule, place))
        reordered += [name] if draft.flag(rule["desc_act"], f"{place}.desc_act") else []
        if spec.is_head and name not in chosen:
            draft.note(
                "reinterpreted", "lm_head is true and no rule is about it: 8 bits, groups of 32, symmetric", [name]
            )
    if rules:
        draft.note("reinterpreted", "expressions were tried as GPTQModel does, the first that matches the beginning")
    if skipped:
        draft.note("kept", "a rule with -: leaves them as they are", skipped)
    if heads:
        draft.note("kept", "a rule matches the head, and lm_head is not true, so GPTQModel leaves it as it is", heads)
    if reordered:
        draft.note(
            "dropped", "desc_act: the order of columns is the quantizer's; `--quantizer gptq --act-order`", reordered
        )
    note_dropped(draft, "the config", config, (*TAKEN, *SAYS_METHOD, "dynamic", "lm_head", "checkpoint_format"))


def _first_matches(draft: Draft, rules: dict[str, Any]) -> dict[str, str]:
    """Linear -> the key that decides about it. Raises PlanError for a rule with a width that matches nothing."""
    bare = [key[2:] if key.startswith(("-:", "+:")) else key for key in rules]
    places = [f"dynamic[{short(key)}]" for key in rules]
    exact: dict[str, int] = {}
    regexes: list[tuple[int, str]] = []
    for index, text in enumerate(bare):
        literal = LITERAL.fullmatch(text)
        if literal:
            exact.setdefault(literal[1].replace("\\.", "."), index)
        else:
            regexes.append((index, text))
    compiled = compile_patterns(draft, ((text, places[index]) for index, text in regexes))
    patterns = [(index, pattern) for (index, _), pattern in zip(regexes, compiled, strict=True)]
    keys, chosen, matched = list(rules), {}, set()
    for name in draft.specs:
        hits = [index for index, pattern in patterns if pattern.match(name)]
        hits += [exact[name]] if name in exact else []
        matched.update(hits)
        if hits:
            chosen[name] = keys[min(hits)]
    for index, key in enumerate(keys):
        if index in matched:
            continue
        if key.startswith("-:"):
            draft.note("dropped", f"{places[index]} leaves modules as they are, and matches no linear of the model")
        else:
            raise draft.fail(
                places[index],
                f"matches the beginning of no linear's name{close_names(_guess(bare[index]), list(draft.specs))}",
            )
    return chosen


def _check_override(draft: Draft, key: str, rule: dict[str, Any]) -> None:
    place = f"dynamic[{short(key)}]"
    for name in SAYS_METHOD:
        if name in rule and rule[name] not in GPTQ_FORMATS:
            raise draft.fail(
                f"{place}.{name}", f"{short(rule[name])} is another method than GPTQ, with weights of another form"
            )
    note_dropped(draft, place, rule, (*TAKEN, *SAYS_METHOD))


def _wanted(draft: Draft, rule: dict[str, Any], place: str) -> Wanted:
    return Wanted(
        draft.bits(rule["bits"], f"{place}.bits"),
        draft.group(rule["group_size"], f"{place}.group_size"),
        draft.flag(rule["sym"], f"{place}.sym"),
    )


def _guess(pattern: str) -> str:
    """An expression without its marks, to find names that are close to it."""
    return re.sub(r"\\d\+?", "0", pattern).replace("\\", "").replace(".*", "").strip("^$")
