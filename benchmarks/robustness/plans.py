"""Plans of ours, mutated: read, applied to a model, written and read again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

from mpq_kernels.plan.plan import Plan
from mpq_kernels.plan.resolve import resolve

from .campaign import Run
from .mutate import mutate_json
from .world import PLAN, linears

# Expressions on which backtracking matchers never end, or which take much memory once they are compiled.
HOSTILE = (
    r"(a+)+$", r"(\w|\w|\.)*!", r"(.*)*x", r"(?:.*.*.*.*.*.*.*.*)*!", r"^(?:(.*?),){30}P", r"(.+)\1+\1+\1+!",
    r"(?:a{60000}){60000}", r"((a{0,100}){0,100}){0,100}!", "(" * 400 + ")" * 400, "(?:" * 90 + "a" + "){1,9}" * 90,
    r"(?=(\w+)+!)", r"(?<=a*)b", "(?i)" + r"[\x00-\U0010ffff]" * 30, "(?i)" + "[^a-z]" * 150, "." * 1000, ".*" * 499,
    r"(?:(?:\w*)*)*!", r"(\w*\w*\w*\w*\w*\w*)*!", r"(?P<a>.)(?P=a)", r"(?:foo){e<=3}", r"[[:alpha:]]+", r"\p{L}+",
    "|".join(["a*b*c*"] * 140), r"(?(1)a|b)", r"(?#", r"\N{BULLET}", r"(?i:M).*", r"(?>\w+)+!", r"\w++\.\w*+",
    r"(?:.?){400}.{400}", "(?=.*)" * 150 + ".*.*.*.*!",
)  # fmt: skip
KNOWN = (*(f"re:{text}" for text in HOSTILE), "bits", "group_size", "symmetric", "zero", "scale_dtype", "segments",
         "perm", "rows", "cols", "name", "members", "modules", "default", "fuse", "version",
         "model.layers.0.mlp.up_proj", "int", "float", "bfloat16", "float32", "q_proj", "o_proj")  # fmt: skip


def with_expressions(chance: Random, plan: Any) -> Any:
    """The plan, in one case of five with rules by hostile expressions."""
    if chance.random() < 0.2:
        plan = copy.deepcopy(plan)
        for text in chance.sample(HOSTILE, chance.choice((1, 2, 20))):
            plan["modules"][f"re:{text}"] = {"bits": chance.randint(1, 8), "group_size": -1}
    return plan


def prepare(folder: Path) -> Run:
    """Cases: `Plan.from_file`, `resolve`, and the plan's own text read again."""
    specs = linears()

    def run(chance: Random) -> str:
        path = Path("plan.json")
        path.write_bytes(mutate_json(chance, with_expressions(chance, PLAN), KNOWN))
        plan = Plan.from_file(path)
        again = Plan.from_dict(json.loads(plan.to_json()))
        assert again == plan
        resolved = resolve(plan, specs)
        names = {member.spec.name for weight in resolved.weights for member in weight.members} | set(resolved.kept)
        assert names == {spec.name for spec in specs}
        assert resolved.size().total_bits % 8 == 0
        return "resolved"

    return run
