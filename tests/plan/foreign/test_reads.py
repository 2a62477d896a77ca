"""Plans of other programs: made files of every format, with the width that each linear of a target model gets."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mpq_kernels.plan.foreign import FORMATS, read_foreign
from mpq_kernels.plan.plan import Plan
from tests.made.checkpoints import tiny_model
from tests.made.commands import Runner
from tests.made.foreign import MODELS, described, expected, linears, write


@dataclass(frozen=True)
class Case:
    """A file, and the linears' widths under rules that are tried in order. auto: whether it is recognised."""

    format: str
    model: str
    file: str
    content: Any
    widths: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    auto: bool = True
    notes: tuple[str, ...] = ()


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYER = [f"self_attn.{name}" for name in ATTENTION] + ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def slim(number, tensors=False):
    """Two layers of the target: hidden columns are two groups, intermediate ones two and a shorter third."""
    layer = {name: [2, 2] for name in LAYER} | {"mlp.down_proj": [2, 3, 3], "self_attn.q_proj": [1, 3]}
    other = {name: [3, 4] for name in LAYER} | {"mlp.down_proj": [4, 1, 1], "self_attn.v_proj": [1, 1]}
    table = {number(0): layer, number(1): other}
    if tensors:
        table[number(0)]["mlp.up_proj"] = torch.tensor([2, 2])
    return table


SLIM = {
    "": "2/128",
    "lm_head": "16",
    "0.self_attn.q_proj": "1/128s@0:128 3/128@128:256",
    "0.mlp.down_proj": "2/128@0:128 3/128@128:256 3/64@256:320",
    r"\.1\.": "3/128@0:128 4/128@128:256",
    "1.self_attn.v_proj": "1/128s",
    "1.mlp.down_proj": "4/128@0:128 1/128s@128:256 1/64s@256:320",
}
BLOCKS = {"": "16", r"self_attn\.[qkvo]_proj": "4/128"}
MC_MOE = BLOCKS | {
    r"0.*experts\.0\.w[13]": "1/128s", r"0.*experts\.0\.w2": "1/96s", r"0.*experts\.1\.w[13]": "2/128",
    r"0.*experts\.1\.w2": "2/96", r"0.*experts\.2\.w[13]": "3/128", r"0.*experts\.2\.w2": "3/96",
    r"\.1\..*experts.*w[13]": "2/128", r"\.1\..*experts.*w2": "2/96",
}  # fmt: skip
MIXDQ = "# widths\nmodel.layers.0.self_attn.q_proj: 8\nmodel.layers.1.mlp.down_proj: 2\nlm_head: 4\n"
GPTQ = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "quant_method": "gptq", "meta": {"x": 1}}
DYNAMIC = {  # the first that matches wins; a beginning is enough; a rule of no width skips
    "-:model\\.layers\\.0\\.self_attn": {},
    "model.layers.0.": {"bits": 8, "group_size": 64},
    "+:.*\\.mlp\\.(gate|up)": {"bits": 3, "sym": False, "mse": 2.4},
    "^model\\.layers\\.1\\.mlp\\.up_proj$": {"bits": 7},
    "lm_head": {"bits": 2},
    "-:.*vision.*": {},
}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int", "iters": 200}
EXTRA = {  # exact names first, then the first expression that is found anywhere in the name
    "layers.1": {"bits": 2, "sym": False},
    "v_proj": {"bits": 6},
    "model.layers.1.mlp.down_proj": {"bits": 8, "group_size": 0},
    "lm_head": {"bits": 5, "group_size": 64},
    "model.layers.0.mlp.gate": {"bits": 16, "data_type": "fp"},
    "model.layers.0.mlp.router": {"bits": 16, "data_type": "fp"},
}


def weights(bits, size=None, **more):
    strategy = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    return {"num_bits": bits, "type": "int", "symmetric": True, "observer": "mse", **strategy, **more}


COMPRESSED = {  # exact, then expressions by the alphabet, then classes; the order in the file says nothing
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*k_proj", "model.layers.0.mlp.router"],
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": weights(4, 128), "input_activations": None},
        "group_1": {"targets": ["re:model.*down", "model.layers.0.mlp.up_proj"], "weights": weights(8)},
        "group_2": {"targets": ["re:.*layers.1.mlp"], "weights": weights(3, 64, symmetric=False)},
    },
}
FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
QUANTMOE = {"": "16", r"self_attn": "4/128", r"experts.*w[13]": "2/128", r"experts.*w2": "2/96"}
WHOLE = {  # qwen2_moe: routed experts, shared ones, attention; the gate of the shared expert is a router
    "": "16", "self_attn": "4/-", r"shared_expert\.": "4/-", r"mlp\.experts": "2/-",
}  # fmt: skip

CASES = [
    Case("slim-llm", "llama", "block.pt", slim(int), SLIM, notes=("stores its groups of 1 bit in 2 bits",)),
    Case("slim-llm", "llama", "tensors.pt", slim(int, tensors=True), SLIM),
    Case("slim-llm", "llama", "slim.json", slim(str), SLIM),
    Case(
        "slim-llm", "llama", "small.json", {"1": {"self_attn.q_proj": [2, 4, 4, 4]}},
        {"": "16", "1.self_attn.q_proj": "2/64@0:64 4/64@64:256"}, {"group_size": 64},
        notes=("the file gives them no width",),
    ),
    Case(
        "mc-moe", "mixtral", "experts.json", {"0": {"0": 1, "1": 2, "2": 3}, "1": {"0": 2, "1": 2, "2": 2}}, MC_MOE,
        notes=("get 4 bits (MC-MoE's default)", "routers stay in 16", "one bit is symmetric"),
    ),
    Case(
        "mc-moe", "mixtral", "experts.pt", {0: {0: 1, 1: 2, 2: 3}, 1: {0: 2, 1: 2, 2: 2}},
        MC_MOE | {r"self_attn": "8/128"}, {"attention_bits": 8},
    ),
    Case(
        "mixdq", "llama", "weight_4.00.yaml", MIXDQ,
        {"": "16", "0.self_attn.q": "8/256", "1.mlp.down": "2/320", "lm_head": "4/256"},
        notes=("the file gives them no width", "no group sizes"),
    ),
    Case(
        "mixdq", "llama", "wrapped.yml", MIXDQ.replace("model.l", "model.model.l").replace("lm_", "model.lm_"),
        {"": "16", "0.self_attn.q": "8/64", "1.mlp.down": "2/64", "lm_head": "4/64"}, {"group_size": 64},
        notes=("wrapper",),
    ),
    Case(
        "shiftaddllm", "llama", "opt.json",
        {f"model.layers.1.{name}": {"bits": 1 + i, "columnwise": True} for i, name in enumerate(LAYER)},
        {"": "16"} | {f"1.{name}": f"{1 + i}/64{'' if i else 's'}" for i, name in enumerate(LAYER)},
        notes=("only the widths are taken", "columnwise"),
    ),
    Case("quantmoe", "mixtral", "bits.txt", "main_2.attn_4\n", QUANTMOE, notes=("no group size",)),
    Case(
        "quantmoe", "mixtral", "all.txt",
        "attn_4.keyword__w2__8.exp_l0e1_3.main_2.layer_1_4.keyword__q_proj__6.exp_l1e0_7",
        QUANTMOE
        | {r"0.*experts.1.w[13]": "3/128", r"\.1\..*experts.*w[13]": "4/128", "w2": "8/96", "q_proj": "6/128"},
    ),
    Case(
        "quantmoe", "mixtral", "kept.txt", "main_2.exp_l0e1_16",
        QUANTMOE | {"self_attn": "2/128", r"0.*experts.1.w[13]": "8/128", r"0.*experts.1.w2": "8/96"},
        {"kept_experts": 8}, notes=("experts that were kept beside packed ones get 8 bits",),
    ),
    Case("quantmoe", "mixtral", "layers.txt", "main_2.attn_4.layer_1_16", QUANTMOE | {r"\.1\..*experts": "16"}),
    Case("quantmoe", "shared", "deepseek.txt", "moe.shared_4.other.2+other_block_4", WHOLE),
    Case(
        "quantmoe", "shared", "swapped.txt", "moe.shared_4.other.2+other_block.8",
        WHOLE | {"self_attn": "8/-", r"shared_expert\.": "2/-", r"mlp\.experts": "4/-"},
        notes=("against the words of the string",),
    ),
    Case(
        "quantmoe", "deepseek", "dense.txt", "moe.all_mlp.2+other_block.4",
        {"": "2/-", "lm_head": "16", "kv_": "16", r"self_attn\.[qo]_proj": "4/-", r"layers\.0\.mlp": "4/-"},
    ),
    Case(
        "gptqmodel", "llama", "quantize_config.json", GPTQ,
        {"": "4/128s", "down": "4/128s@0:256 4/64s@256:320", "lm_head": "16"}, notes=("a segment of its own",),
    ),
    Case(
        "gptqmodel", "llama", "dynamic.json", GPTQ | {"dynamic": DYNAMIC},
        {"": "4/128s", "lm_head": "16", "layers.0.self_attn": "16", "layers.0.mlp": "8/64s",
         r"layers.1.mlp.(gate|up)": "3/128", "layers.1.mlp.down": "4/128s@0:256 4/64s@256:320"},
        notes=("the first that matches", "-: leaves them", "lm_head is not true", "'-:.*vision.*'", "'mse'"),
    ),
    Case(
        "gptqmodel", "mixtral", "head.json",
        {"quantization_config": GPTQ | {"lm_head": True, "desc_act": True, "group_size": -1}},
        {"": "4/128s", "w2": "4/96s", "lm_head": "8/32s"}, notes=("lm_head is true", "desc_act"),
    ),
    Case(
        "auto-round", "llama", "config.json", {"quantization_config": ROUND},
        {"": "4/128s", "lm_head": "16", "down": "4/128s@0:256 4/64s@256:320"},
    ),
    Case(
        "auto-round", "llama", "extra.json", ROUND | {"block_name_to_quantize": "model.layers", "extra_config": EXTRA},
        {"": "4/128s", "0.mlp.down": "4/128s@0:256 4/64s@256:320", "0.*v_proj": "6/128s", "layers.1": "2/128",
         "1.mlp.down_proj": "8/320s", "lm_head": "5/64s", "0.mlp.gate": "16"},
        notes=("one scale for the whole weight", "no linear of the model"),
    ),
    Case(
        "auto-round", "llama", "blocks.json",
        ROUND | {"block_name_to_quantize": [["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]],
                 "extra_config": {"model.layers.1.mlp.up_proj": {"bits": 4, "data_type": "mx_fp"}}},
        {"": "16", "1.mlp.gate": "4/128s", "1.mlp.down": "4/128s@0:256 4/64s@256:320"}, {"keep_floats": True},
        notes=("a float type is kept",),
    ),
    Case(
        "compressed-tensors", "llama", "compressed.json", COMPRESSED,
        {"": "4/128s", "down": "8/320s", "layers.1.mlp": "3/64", "0.mlp.up": "8/256s", "k_proj": "16",
         "lm_head": "16"},
        notes=("in alphabetical order", "the file ignores them", "router"),
    ),
    Case(
        "compressed-tensors", "mixtral", "float.json",
        {"quantization_config": COMPRESSED | {"ignore": None, "config_groups": {
            "a": {"targets": ["re:.*self_attn.*"], "weights": FLOAT, "input_activations": {"num_bits": 8}},
            "b": {"targets": ["Linear"], "weights": {"num_bits": 6}}}}},
        {"": "6/128s", "w2": "6/96s", "self_attn": "16"}, {"keep_floats": True},
        notes=("a float type is kept", "input_activations", "one for each row"),
    ),
]  # fmt: skip


def test_a_width_of_16_keeps(tmp_path):
    """In every format whose rules name widths one by one."""
    q0 = "model.layers.0.self_attn.q_proj"
    files = {
        "mixdq": ("w.yaml", f"{q0}: 16\nlm_head: 3\n"),
        "shiftaddllm": ("s.json", {q0: {"bits": 16, "columnwise": False}, "lm_head": {"bits": 3, "columnwise": False}}),
        "gptqmodel": ("g.json", GPTQ | {"dynamic": {q0: {"bits": 16}}}),
        "auto-round": ("r.json", ROUND | {"extra_config": {q0: {"bits": 32, "data_type": "fp"}}}),
        "compressed-tensors": ("c.json", {"config_groups": {"g": {"targets": [q0]}, "h": {"targets": ["Linear"],
                                                                                         "weights": {"num_bits": 3}}}}),
    }  # fmt: skip
    for form, (name, content) in files.items():
        plan = read_foreign(write(tmp_path, name, content), form, linears("llama")).plan
        assert plan.modules[q0].kept and not all(rule.kept for rule in plan.modules.values()), form


def settled(widths, model):
    """ "-" for the group is all of K."""
    k = {spec.name: spec.in_features for spec in linears(model)}
    return {name: value.replace("/-", f"/{k[name]}") for name, value in widths.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.format}-{case.file}")
def test_widths_of_every_linear(case, tmp_path):
    path = write(tmp_path, case.file, case.content)
    imported = read_foreign(path, case.format, linears(case.model), **case.options)
    assert described(imported.plan, case.model) == settled(expected(case.model, case.widths), case.model)
    texts = [str(note) for note in imported.notes]
    assert [text for text in case.notes if not any(text in note for note in texts)] == []
    assert all(note.kind in ("changed", "reinterpreted", "dropped", "kept") for note in imported.notes)
    known = {spec.name for spec in linears(case.model)}
    assert all(set(note.modules) <= known for note in imported.notes)

    found = read_foreign(path, "auto", linears(case.model), **case.options)
    assert (found.format, found.plan) == (case.format, imported.plan)

    imported.plan.to_file(tmp_path / "plan.json")
    assert Plan.from_file(tmp_path / "plan.json") == imported.plan
    assert set(imported.plan.modules) == known and imported.plan.default is None


def test_every_format_has_cases():
    assert {case.format for case in CASES} == set(FORMATS)
    assert {case.model for case in CASES} == set(MODELS)


def test_a_quantmoe_string_needs_no_file():
    text = "main_3.attn_4.layer_0_2." + ".".join(f"exp_l1e{i}_4" for i in (0, 1, 2)) + ".exp_l0e0_5" * 300
    plan = read_foreign(text, "quantmoe", linears("mixtral")).plan
    rules = {"": "16", "self_attn": "4/128", r"layers\.0.*w[13]": "2/128", r"layers\.0.*w2": "2/96"}
    rules |= {r"layers\.1.*w[13]": "4/128", r"layers\.1.*w2": "4/96"}
    assert described(plan, "mixtral") == expected("mixtral", rules)


def test_many_exact_names_are_not_expressions(tmp_path):
    """GPTQModel writes one rule of the form ^name$ for each module; more of them than expressions are allowed."""
    rules = {f"-:^model\\.layers\\.{i}\\.mlp\\.gone$": {} for i in range(1500)}
    rules |= {"^model\\.layers\\.1\\.mlp\\.up_proj$": {"bits": 2}, ".*up_proj": {"bits": 3}}
    plan = read_foreign(write(tmp_path, "q.json", GPTQ | {"dynamic": rules}), "gptqmodel", linears("llama")).plan
    assert plan.modules["model.layers.1.mlp.up_proj"].bits == 2 and plan.modules["model.layers.0.mlp.up_proj"].bits == 3


def test_the_command_writes_a_plan_and_says_what_changed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("mixtral", tmp_path / "dense", sizes=MODELS["mixtral"][1])
    write(tmp_path, "e.json", {"0": {"0": 1, "1": 2, "2": 3}, "1": {"0": 2, "1": 2, "2": 2}})
    run = Runner(capsys, "plan")
    told = run("import", "e.json", "--model", "dense", "-o", "plan.json")
    assert "reinterpreted: one bit is symmetric" in told.err and "wrote plan.json, from a mc-moe plan" in told.err
    assert told.out == ""
    run("validate", "plan.json", "dense")
    assert described(Plan.from_file("plan.json"), "mixtral") == expected("mixtral", MC_MOE)

    printed = run("import", "e.json", "--model", "dense/config.json", "--from", "mc-moe", "--quiet")
    assert printed.out == (tmp_path / "plan.json").read_text() and printed.err == ""
    facts = run("import", "e.json", "--model", "dense", "--attention-bits", "8", "--json").json()
    assert facts["format"] == "mc-moe" and facts["output"] is None
    assert facts["plan"]["modules"]["model.layers.0.self_attn.q_proj"]["bits"] == 8
    kinds = [note["kind"] for note in facts["notes"]]
    assert kinds.count("changed") == 1 and "reinterpreted" in kinds
    sizes = [spec.out_features * spec.in_features for spec in linears("mixtral") if not spec.is_head]
    assert facts["packed"]["weights"] == sum(sizes)
    assert json.loads(json.dumps(facts["plan"])) == json.loads(Plan.from_dict(facts["plan"]).model_dump_json())
    assert "did you mean mc-moe" in run.misuse("import", "e.json", "--model", "dense", "--from", "mcmoe")
