"""Plans as values and files: what a JSON text may say, every refusal in words, and the file's bytes."""

from __future__ import annotations

import json
import os

import pytest

from mpq_kernels.dense.checkpoint import LinearSpec
from mpq_kernels.errors import PlanError
from mpq_kernels.files import strict
from mpq_kernels.plan import plan as plan_module
from mpq_kernels.plan.plan import FusePlan, Plan, SegmentPlan, WeightPlan

LINEARS = [
    LinearSpec("model.layers.0.mlp.up_proj", 128, 64, "model.layers.0.mlp.up_proj.weight"),
    LinearSpec("lm_head", 256, 64, "model.embed_tokens.weight", is_head=True, tied=True),
]


def module(rule: object, key: str = "a.b") -> dict:
    return {"version": 1, "modules": {key: rule}}


# data -> words that the refusal must contain
BAD_PLANS = {
    "not an object": ([], ["the whole", "dict"]),
    "no version": ({}, ["no version", '"version": 1']),
    "other version": ({"version": 2}, ["version 2; this package reads 1"]),
    "version as text": ({"version": "1"}, ["version '1'; this package reads 1"]),
    "unknown key": ({"version": 1, "modles": {}}, ["modles: unknown key", "did you mean modules"]),
    "unknown rule key": (module({"bits": 3, "group": 64}), ["modules['a.b'].group: unknown key", "group_size"]),
    "no bits": (module({"group_size": 64}), ["modules['a.b'].bits: is missing"]),
    "bits 0": (module({"bits": 0}), ["modules['a.b'].bits", "bits=0 is neither 1..8 nor 16"]),
    "bits 9": (module({"bits": 9}), ["bits=9"]),
    "bits true": (module({"bits": True}), ["modules['a.b'].bits", "integer", "True"]),
    "bits 4.5": (module({"bits": 4.5}), ["modules['a.b'].bits", "4.5"]),
    "bits as text": (module({"bits": "4"}), ["modules['a.b'].bits", "'4'"]),
    "group 0": (module({"bits": 3, "group_size": 0}), ["group_size=0 is neither positive nor -1"]),
    "group -2": (module({"bits": 3, "group_size": -2}), ["group_size=-2"]),
    "scale dtype": (module({"bits": 3, "scale_dtype": "fp16"}), ["modules['a.b'].scale_dtype", "'float16'", "'fp16'"]),
    "symmetric with zeros": (module({"bits": 3, "symmetric": True, "zero": "float"}), ["symmetric", "zero='float'"]),
    "symmetric with minima": (module({"bits": 3, "symmetric": True, "zero": "min"}), ["symmetric", "zero='min'"]),
    "unknown zeros": (module({"bits": 3, "zero": "many"}), ["modules['a.b'].zero", "zero='many' is not one of"]),
    "reserved zeros": (module({"bits": 3, "zero": "table"}), ["zero='table' is reserved"]),
    "symmetric as number": (module({"bits": 3, "symmetric": 1}), ["modules['a.b'].symmetric", "boolean"]),
    "kept with segments": (module({"bits": 16, "segments": [{"bits": 3}]}), ["bits=16", "cannot have segments"]),
    "kept with perm": (module({"bits": 16, "perm": [0]}), ["bits=16", "cannot have perm"]),
    "no segments": (module({"bits": 3, "segments": []}), ["segments is an empty list"]),
    "segment kept": (module({"bits": 3, "segments": [{"bits": 16}]}), ["segments[0].bits", "16"]),
    "segment empty rows": (
        module({"bits": 3, "segments": [{"bits": 3, "rows": [8, 8]}]}),
        ["segments[0].rows", "[8, 8]"],
    ),
    "segment negative": (
        module({"bits": 3, "segments": [{"bits": 3, "cols": [-64, 0]}]}),
        ["segments[0].cols", "[-64, 0]"],
    ),
    "segment cut": (module({"bits": 3, "segments": [{"bits": 3, "cols": [32, None]}]}), ["multiples of 64; 32 is not"]),
    "segment zero": (
        module({"bits": 3, "segments": [{"bits": 3, "symmetric": True, "zero": "int"}]}),
        ["segments[0]", "zero='int'"],
    ),
    "segment of three": (module({"bits": 3, "segments": [{"bits": 3, "rows": [0, 1, 2]}]}), ["segments[0].rows"]),
    "perm of text": (module({"bits": 3, "perm": ["0"]}), ["modules['a.b'].perm[0]", "'0'"]),
    "bad regex": (module({"bits": 3}, "re:("), ["modules", "'(' is not a regular expression"]),
    "long regex": (module({"bits": 3}, "re:" + "a" * 1001), ["regex of 1001 characters"]),
    "many regexes": ({"version": 1, "modules": {f"re:{i}": {"bits": 3} for i in range(1001)}}, ["1001 regexes"]),
    "fuse one": ({"version": 1, "fuse": [{"name": "f", "members": ["q"]}]}, ["fuse[0]", "at least two"]),
    "fuse twice": ({"version": 1, "fuse": [{"name": "f", "members": ["q", "q"]}]}, ["fuse[0]", "repeat a name"]),
    "fuse itself": ({"version": 1, "fuse": [{"name": "q", "members": ["q", "k"]}]}, ["fuse[0]", "repeat a name"]),
    "fuse path": ({"version": 1, "fuse": [{"name": "f", "members": ["a.q", "k"]}]}, ["fuse[0]", "'a.q'"]),
    "several": (
        {"version": 1, "default": {"bits": 9}, "modules": {"x": {"bits": 0}}},
        ["2 problem(s)", "default.bits", "modules.x.bits"],
    ),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_bad_plan_is_refused_in_words(case: str) -> None:
    data, words = BAD_PLANS[case]
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(data, "plan.json")
    for word in ["plan.json", *words]:
        assert word in str(caught.value)


def test_constructors_raise_plan_errors() -> None:
    for build, word in (
        (lambda: WeightPlan(bits=9), "bits=9"),
        (lambda: SegmentPlan(bits=0), "bits"),
        (lambda: FusePlan(name="f", members=("q",)), "two members"),
        (lambda: Plan(version=3), "version 3"),
    ):
        with pytest.raises(PlanError, match=word):
            build()


def test_many_problems_are_counted_not_all_listed() -> None:
    rules = {f"m{i}": {"bits": 9} for i in range(50)}
    with pytest.raises(PlanError, match=r"50 problem\(s\)") as caught:
        Plan.from_dict({"version": 1, "modules": rules})
    assert "and 30 more" in str(caught.value)


BAD_FILES = {
    "not JSON": (b"{", "not valid JSON"),
    "not UTF-8": (b"\xff\xfe", "not valid JSON"),
    "key twice": (b'{"version": 1, "modules": {"a": {"bits": 2}, "a": {"bits": 3}}}', "'a' appears twice"),
    "NaN": (b'{"version": 1, "default": {"bits": NaN}}', "NaN is not JSON"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "other version": (b'{"version": 7, "anything": 1}', "version 7; this package reads 1"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_by_name(case: str, tmp_path) -> None:
    data, word = BAD_FILES[case]
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(PlanError) as caught:
        Plan.from_file(path)
    assert str(path) in str(caught.value) and word in str(caught.value)


def test_missing_and_oversized_files_are_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.from_file(tmp_path / "none.json")
    monkeypatch.setattr(plan_module, "MAX_PLAN_BYTES", 100)
    (tmp_path / "big.json").write_bytes(b" " * 101)
    with pytest.raises(PlanError, match="larger than 100 bytes"):
        Plan.from_file(tmp_path / "big.json")


def full_plan() -> Plan:
    return Plan(
        model="a model",
        default=WeightPlan(bits=3, group_size=-1, symmetric=True, scale_dtype="bfloat16"),
        modules={
            "z.last": WeightPlan(bits=16),
            "re:b.*": WeightPlan(bits=2, zero="float"),
            "a.first": WeightPlan(
                bits=3,
                segments=(SegmentPlan(bits=8, cols=(0, 64)), SegmentPlan(bits=1, cols=(64, None), symmetric=True)),
                perm=tuple(range(127, -1, -1)),
            ),
            "re:a.*": WeightPlan(bits=4),
        },
        fuse=(FusePlan(name="qkv_proj", members=("q_proj", "k_proj", "v_proj")),),
    )


def test_file_round_trip_and_stable_bytes(tmp_path) -> None:
    plan = full_plan()
    plan.to_file(tmp_path / "a.json")
    read = Plan.from_file(tmp_path / "a.json")
    assert read == plan
    read.to_file(tmp_path / "b.json")
    first = (tmp_path / "a.json").read_bytes()
    assert first == (tmp_path / "b.json").read_bytes()
    # Exact names are sorted; regexes keep their order, because the last one that matches decides.
    assert list(json.loads(first)["modules"]) == ["a.first", "z.last", "re:b.*", "re:a.*"]
    assert sorted(os.listdir(tmp_path)) == ["a.json", "b.json"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "plan.json"
    Plan().to_file(path)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(strict, "write_all", fail)
    with pytest.raises(OSError, match="disk full"):
        full_plan().to_file(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["plan.json"]


def test_documented_example_is_a_plan() -> None:
    text = (plan_module.__doc__ or "").split("\n\n")[1]
    plan = Plan.from_dict(json.loads(text))
    assert plan.modules["re:model\\.layers\\.[0-3]\\..*"].bits == 4
    assert [s.bits for s in plan.modules["model.layers.5.mlp.down_proj"].segments or ()] == [8, 3]


def test_json_schema_names_every_field() -> None:
    schema = Plan.model_json_schema()
    assert set(schema["properties"]) == {"version", "model", "default", "modules", "fuse"}
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["WeightPlan"]["properties"]["bits"]["enum"] == [1, 2, 3, 4, 5, 6, 7, 8, 16]


def test_uniform_keeps_the_head_unless_told() -> None:
    plan = Plan.uniform(LINEARS, bits=3, group_size=64, symmetric=True)
    assert plan.default == WeightPlan(bits=3, group_size=64, symmetric=True)
    assert {key: rule.bits for key, rule in plan.modules.items()} == {"lm_head": 16}
    assert Plan.uniform(LINEARS, bits=3, lm_head=6).modules["lm_head"] == WeightPlan(bits=6)
    assert Plan.uniform(LINEARS[:1], bits=3).modules == {}


def test_uniform_refuses_bad_arguments() -> None:
    for arguments, word in (
        ({"bits": 12}, "bits=12"),
        ({"bits": 3, "group_size": 0}, "group_size=0"),
        ({"bits": 3, "lm_head": 11}, "bits=11"),
    ):
        with pytest.raises(PlanError, match=word):
            Plan.uniform(LINEARS, **arguments)
    with pytest.raises(PlanError, match="no linear layers"):
        Plan.uniform([], bits=3)


def test_plans_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        full_plan().default = None  # type: ignore[misc]
