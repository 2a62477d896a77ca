"""Plans of other programs, mutated: JSON, YAML, strings and what torch.save writes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from mpq_kernels.plan.foreign import AUTO, FORMATS, read_foreign
from mpq_kernels.plan.resolve import resolve

from .campaign import Run
from .mutate import TEXTS, mutate_bytes, mutate_json
from .plans import HOSTILE
from .world import linears

LAYERS = range(2)
MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
GPTQ = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": True, "quant_method": "gptq",
        "dynamic": {r"+:.*\.0\..*(up|gate)_proj": {"bits": 8}, r"-:.*down_proj": {}}}  # fmt: skip
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int",
         "block_name_to_quantize": "model.layers",
         "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8}, ".*v_proj.*": {"bits": 6}}}  # fmt: skip
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
TENSORS = {"quant_method": "compressed-tensors", "ignore": ["lm_head", r"re:.*o_proj"],
           "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS},
                             "group_1": {"targets": [r"re:.*(up|down)_proj"], "weights": WEIGHTS}}}  # fmt: skip
SLIM = {str(i): {name: [2] if "mlp" not in name else [3] for name in MODULES} for i in LAYERS}
TABLE = {f"model.layers.{i}.{name}": 4 for i in LAYERS for name in MODULES}
SHIFT = {name: {"bits": 3, "columnwise": True} for name in TABLE}
EXPERTS = {str(i): {str(e): 2 + e % 3 for e in range(4)} for i in LAYERS}
STRINGS = (
    "main_2.attn_4",
    "main_3.exp_l1e3_8.layer_0_4.keyword__q_proj__5",
    "all_4",
    "moe.shared_2.other.4+other_block.8",
)
OPTIONS: tuple[dict[str, Any], ...] = ({}, {}, {"keep_floats": True}, {"group_size": 64}, {"kept_experts": 8})
# name -> (the format, model, a document of it)
JSON: dict[str, tuple[str, str, Any]] = {
    "gptq": ("gptqmodel", "llama", GPTQ), "round": ("auto-round", "llama", ROUND),
    "tensors": ("compressed-tensors", "llama", TENSORS), "slim": ("slim-llm", "llama", SLIM),
    "shift": ("shiftaddllm", "llama", SHIFT), "experts": ("mc-moe", "mixtral", EXPERTS),
    "inside": ("gptqmodel", "llama", {"model_type": "llama", "quantization_config": GPTQ}),
}  # fmt: skip
KNOWN = (*HOSTILE, "bits", "group_size", "sym", "desc_act", "dynamic", "lm_head", "extra_config", "data_type",
         "targets", "weights", "ignore", "strategy", "channel", "tensor", "num_bits", "Linear", "re:.*", "fp8",
         "quant_method", "actorder", "block_name_to_quantize", "self_attn.k_proj")  # fmt: skip


def _json(chance: Random) -> tuple[str, str, str, bytes]:
    form, model, value = JSON[chance.choice(list(JSON))]
    if chance.random() < 0.15:
        value = json.loads(json.dumps(value))
        for text in chance.sample(HOSTILE, chance.choice((1, 2, 20))):
            if form == "gptqmodel":
                value.setdefault("dynamic", {})[text] = {"bits": 8}
            elif form == "auto-round":
                value["extra_config"][text] = {"bits": 8}
            elif form == "compressed-tensors":
                chance.choice((value["ignore"], value["config_groups"]["group_1"]["targets"])).append(f"re:{text}")
    return form, model, "plan.json", mutate_json(chance, value, KNOWN)


def _yaml(chance: Random) -> tuple[str, str, str, bytes]:
    lines = [f"{name}: {bits}" for name, bits in TABLE.items()]
    for _ in range(chance.choice((0, 1, 3))):
        piece = chance.choice(("&a [*a]", "*a", "!!python/object/apply:os.system ['true']", "!!binary aGk=", "{" * 400,
                               "[" * 99 + "]" * 99, "- " * 300, "? ", "2001-01-01", "1e400", "0x1F", "0b11", "1_000",
                               "!!int '9999999999999999999999'", "<<: {a: 1}", "~", ".nan", "12:30:45", "0o8", "09",
                               "9" * 5000, "!!timestamp '2001-99-99'", "!!set {a}", "!!omap [a: 1]", "2001-02-30",
                               "!!float 'x'", "!!int 'x'", "!!bool 'x'", "[1]: 2", "%YAML 9.9", "--- a", "|\n x",
                               *TEXTS[:14]))  # fmt: skip
        at = chance.randrange(len(lines) + 1)
        lines.insert(at, f"model.layers.0.mlp.x{at}: {piece}" if chance.random() < 0.7 else piece)
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return "mixdq", "llama", "plan.yaml", mutate_bytes(chance, data) if chance.random() < 0.5 else data


def _string(chance: Random) -> tuple[str, str, str, bytes]:
    words = chance.choice(STRINGS).split(".")
    for _ in range(chance.choice((0, 1, 3))):
        word = chance.choice(("exp_l9e9_2", "exp_l1e1_99", "layer_1_16", "keyword____3", "main_9", "attn_44", "",
                              "keyword__.*__4", "exp_l0e0_" + "9" * 5000, "²", "main_٣", *TEXTS[:12]))  # fmt: skip
        words.insert(chance.randrange(len(words) + 1), word)
    data = ".".join(words).encode("utf-8", "surrogatepass")
    return "quantmoe", "mixtral", "plan.txt", mutate_bytes(chance, data) if chance.random() < 0.3 else data


def _torch(chance: Random) -> tuple[str, str, str, bytes]:
    if chance.random() < 0.5:
        form, model = "mc-moe", "mixtral"
        value: Any = {i: {e: 2 + e % 3 for e in range(4)} for i in LAYERS}
    else:
        form, model = "slim-llm", "llama"
        value = {i: {name: torch.tensor([3]) if "up" in name else [2] for name in MODULES} for i in LAYERS}
    part = value[chance.choice((0, 1))]
    odd = (torch.tensor(3.5), torch.tensor(4), torch.tensor([]), torch.zeros(3, 3), torch.tensor(1 + 2j), True, None,
           torch.tensor([2**40]), torch.empty(10**6, device="meta"), torch.ones(1).expand(10**9), "x", -1, 10**30,
           torch.tensor([1]).to_sparse(), [[]], torch.tensor([float("nan")]), float("inf"), (2,), {2})  # fmt: skip
    if chance.random() < 0.7:
        part[chance.choice([*part, "new", 7, -1, 2**70, None, 1.5, True])] = chance.choice(odd)
    buffer = io.BytesIO()
    torch.save(value, buffer)
    data = buffer.getvalue()
    return form, model, "plan.pt", mutate_bytes(chance, data) if chance.random() < 0.7 else data


MAKERS: tuple[Callable[[Random], tuple[str, str, str, bytes]], ...] = (
    _json,
    _json,
    _json,
    _json,
    _yaml,
    _string,
    _torch,
)


def prepare(folder: Path) -> Run:
    """Cases: `read_foreign` of one file; what is read must resolve and name every linear."""
    linears("mixtral"), linears("llama")

    def run(chance: Random) -> str:
        form, model, name, data = chance.choice(MAKERS)(chance)
        path = Path(name)
        path.write_bytes(data)
        how = chance.choice((form, form, form, AUTO, chance.choice(list(FORMATS))))
        options: dict[str, Any] = chance.choice(
            ({}, {}, {"keep_floats": True}, {"group_size": 64}, {"kept_experts": 8})
        )
        imported = read_foreign(path, how, linears(model), **options)
        resolve(imported.plan, linears(model))
        assert set(imported.plan.modules) == {spec.name for spec in linears(model)}
        for note in imported.notes:
            str(note)
        return "imported"

    return run
