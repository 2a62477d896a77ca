"""compressed-tensors: `config_groups` of targets and the form of their weights, and a list of what to ignore.

    {"quant_method": "compressed-tensors", "ignore": ["lm_head"],
     "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": true,
                                                                      "strategy": "group", "group_size": 128}}}}

Its rules, which differ from those of our plans: a target is the exact name of a module, `re:` and an expression that
must match at the beginning of the name, or the name of a class. Exact names win over expressions, and those over
classes; among expressions the first in the order of the alphabet wins, whatever their order in the file. One and the
same target in two groups belongs to the last. What `ignore` matches is left as it is.

Source: https://github.com/vllm-project/compressed-tensors, utils/match.py and quantization/lifecycle/apply.py, version
0.20.0.
"""

from __future__ import annotations

from typing import Any

from ...files.strict import close_names, short
from ...format.codes import KEPT_BITS
from ..plan import REGEX
from .configs import config_of, method_of, names, note_dropped, table
from .documents import Document
from .draft import Draft, Wanted
from .options import Options
from .patterns import compile_patterns

METHOD = "compressed-tensors"
CLASSES = ("Linear", "Module")  # of a linear, itself and what it inherits from
GROUP_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
WEIGHT_KEYS = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder", "block_structure")
WEIGHT_KEYS_IGNORED = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
COLUMN_ORDERS = ("group", "dynamic")
ROW_SCALE = -1


def is_compressed(document: Document) -> bool:
    """Whether a JSON file has config_groups."""
    return isinstance(config_of(document).get("config_groups"), dict)


def read_compressed(document: Document, draft: Draft, options: Options) -> None:
    """Widths of what the targets match. Raises PlanError."""
    config = config_of(document)
    if method_of(config) not in (None, METHOD):
        raise draft.fail(
            "quant_method", f"{short(method_of(config))} is not {METHOD!r}; other methods have other formats"
        )
    groups = table(draft, config.get("config_groups"), "config_groups")
    if not groups:
        raise draft.fail("config_groups", "is missing or empty, so the file gives no width")
    owners: dict[str, str] = {}  # target -> group, the last that names it
    wishes: dict[str, Wanted] = {}
    floats = []
    for key, group in groups.items():
        place = f"config_groups.{key}"
        if isinstance(group, list):
            raise draft.fail(
                place, "is the name of a preset scheme; save the config with compressed-tensors, which writes it out"
            )
        group = table(draft, group, place)
        _known(draft, place, group, GROUP_KEYS)
        owners.update(dict.fromkeys(names(draft, group.get("targets"), f"{place}.targets"), key))
        wanted = _wanted(draft, group.get("weights"), f"{place}.weights", options)
        floats += [key] if isinstance(wanted, str) else []
        wishes[key] = Wanted(KEPT_BITS, ROW_SCALE) if isinstance(wanted, str) else wanted
        note_dropped(draft, place, group, ("targets", "weights", "format"))
    ignored = _ignored(draft, names(draft, config.get("ignore"), "ignore"))
    chosen = _choose(draft, list(owners))
    for name, target in chosen.items():
        if name not in ignored:
            draft.want(name, wishes[owners[target]])
    if any(target.startswith(REGEX) for target in owners):
        draft.note(
            "reinterpreted", "expressions were tried as compressed-tensors does: the beginning, in alphabetical order"
        )
    if ignored:
        draft.note("kept", "the file ignores them", [name for name in draft.specs if name in ignored])
    for key in floats:
        held = [name for name, target in chosen.items() if owners[target] == key and name not in ignored]
        draft.note("changed", f"{key}: a float type is kept in {KEPT_BITS} bits, as keep_floats asks", held)
    note_dropped(
        draft, "the config", config, ("quant_method", "config_groups", "ignore", "format", "quantization_status")
    )
    for name in ignored:
        draft.want(name, Wanted(KEPT_BITS, ROW_SCALE))


def _choose(draft: Draft, targets: list[str]) -> dict[str, str]:
    """Linear -> the target that decides about it. Raises PlanError for a target that matches no linear."""
    regexes = sorted(target for target in targets if target.startswith(REGEX))
    compiled = compile_patterns(draft, ((t.removeprefix(REGEX), f"target {short(t)}") for t in regexes))
    plain = [target for target in targets if not target.startswith(REGEX)]
    unknown = [t for t in plain if t not in draft.specs and t not in CLASSES]
    if unknown:
        raise draft.fail(
            f"target {short(unknown[0])}",
            f"is neither a linear of the model nor the class Linear{close_names(unknown[0], [*CLASSES, *draft.specs])}",
        )
    chosen: dict[str, str] = {}
    for target in sorted(plain):
        if target in draft.specs:
            chosen[target] = target
    for target, pattern in zip(regexes, compiled, strict=True):
        found = [name for name in draft.specs if pattern.match(name)]
        if not found:
            raise draft.fail(f"target {short(target)}", "matches the beginning of no linear's name")
        for name in found:
            chosen.setdefault(name, target)
    for target in (t for t in sorted(plain) if t in CLASSES and t not in draft.specs):
        for name in draft.specs:
            chosen.setdefault(name, target)
    return chosen


def _ignored(draft: Draft, ignore: list[str]) -> set[str]:
    """Linears that the list matches; what it names beside them is noted."""
    out: set[str] = set()
    regexes = [entry for entry in ignore if entry.startswith(REGEX)]
    compiled = compile_patterns(draft, ((e.removeprefix(REGEX), f"ignore {short(e)}") for e in regexes))
    patterns = dict(zip(regexes, compiled, strict=True))
    nothing = []
    for entry in ignore:
        if entry in patterns:
            found = [name for name in draft.specs if patterns[entry].match(name)]
        else:
            found = list(draft.specs) if entry in CLASSES else [entry] if entry in draft.specs else []
        out.update(found)
        nothing += [] if found else [short(entry)]
    if nothing:
        draft.note("dropped", f"ignored, and no linear of the model that could be packed: {', '.join(nothing[:10])}")
    return out


def _wanted(draft: Draft, weights: Any, place: str, options: Options) -> Wanted | str:
    """What a group asks for; text instead when it is a float type that is to be kept."""
    if weights is None:
        return Wanted(KEPT_BITS, ROW_SCALE)
    weights = table(draft, weights, place)
    _known(draft, place, weights, (*WEIGHT_KEYS, *WEIGHT_KEYS_IGNORED))
    kind = str(weights.get("type", "int")).lower()
    if kind != "int":
        if kind == "float" and options.keep_floats:
            return kind
        raise draft.fail(
            f"{place}.type",
            f"{short(weights['type'])}: this package stores integers alone, not fp8, nvfp4 or mxfp4"
            + (f"; keep_floats (--keep-floats) keeps such weights in {KEPT_BITS} bits" if kind == "float" else ""),
        )
    if weights.get("dynamic") not in (None, False):
        raise draft.fail(f"{place}.dynamic", "weights whose scales are made while the model runs cannot be packed")
    if weights.get("actorder") in COLUMN_ORDERS:
        draft.note(
            "dropped", f"{place}.actorder: the order of columns is the quantizer's; `--quantizer gptq --act-order`"
        )
    bits = draft.bits(weights.get("num_bits", 8), f"{place}.num_bits")
    symmetric = draft.flag(weights.get("symmetric", True), f"{place}.symmetric")
    return Wanted(bits, _group(draft, weights, place), symmetric)


def _group(draft: Draft, weights: dict[str, Any], place: str) -> int:
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == ROW_SCALE else "group"
    if strategy == "group":
        if size is None or size == ROW_SCALE:
            raise draft.fail(f"{place}.group_size", f"{short(size)}: strategy 'group' needs a positive one")
        return draft.group(size, f"{place}.group_size")
    if strategy == "channel":
        return ROW_SCALE
    if strategy == "tensor":
        draft.note("reinterpreted", f"{place}: one scale for the whole weight becomes one for each row")
        return ROW_SCALE
    raise draft.fail(
        f"{place}.strategy", f"{short(strategy)} is not one of group, channel, tensor; weights have scales by row"
    )


def _known(draft: Draft, place: str, value: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in value:
        if key not in known:
            raise draft.fail(f"{place}.{key}", f"is an unknown key{close_names(key, known)}")
