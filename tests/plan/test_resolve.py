"""A plan applied to a model: which rule wins, layouts, exact sizes, fuse groups, and every refusal in words."""

from __future__ import annotations

import pytest

from mpq_kernels.dense.checkpoint import LinearSpec
from mpq_kernels.errors import PlanError
from mpq_kernels.format.layout import Embedding, SizeBreakdown
from mpq_kernels.plan.plan import Plan
from mpq_kernels.plan.resolve import ResolvedPlan, resolve

SHAPES = {"q_proj": (256, 256), "k_proj": (128, 256), "v_proj": (128, 256), "o_proj": (256, 256)}


def linears(bias: tuple[str, ...] = (), extra: tuple[LinearSpec, ...] = ()) -> list[LinearSpec]:
    specs = []
    for layer in range(2):
        for child, (n, k) in SHAPES.items():
            name = f"model.layers.{layer}.self_attn.{child}"
            specs.append(LinearSpec(name, n, k, f"{name}.weight", f"{name}.bias" if child in bias else None))
        specs.append(
            LinearSpec(f"model.layers.{layer}.mlp.down_proj", 256, 640, f"model.layers.{layer}.mlp.down_proj.w")
        )
    specs.append(LinearSpec("lm_head", 512, 256, "embed.weight", is_head=True, tied=True))
    return [*specs, *extra]


Q0 = "model.layers.0.self_attn.q_proj"
K0 = "model.layers.0.self_attn.k_proj"
V0 = "model.layers.0.self_attn.v_proj"
DOWN0 = "model.layers.0.mlp.down_proj"
QKV = {"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]}
THREE = {"bits": 3}


def applied(specs: list[LinearSpec] | None = None, **plan: object) -> ResolvedPlan:
    return resolve(Plan.from_dict({"version": 1, **plan}), specs or linears())


def layouts(resolved: ResolvedPlan) -> dict[str, list[list[object]]]:
    return {w.name: w.layout.to_dict()["segments"] for w in resolved.weights}


def test_uniform_over_a_model() -> None:
    resolved = resolve(Plan.uniform(linears(), bits=3), linears())
    assert [w.name for w in resolved.weights] == [s.name for s in linears() if not s.is_head]
    assert resolved.kept == {"lm_head": "plan: 16 bits"}
    assert layouts(resolved)[DOWN0] == [[0, 256, 0, 640, 3, 64, "int"]]
    assert all(not w.fused and w.members[0].layout == w.layout for w in resolved.weights)


def test_which_rule_wins() -> None:
    resolved = applied(
        modules={
            Q0: {"bits": 8},
            "re:.*_proj": {"bits": 2},
            "re:.*self_attn.*": {"bits": 4},
            "re:.*layers.1.mlp.*": THREE,
        },
        default={"bits": 5},
    )
    bits = {w.name: w.layout.segments[0].bits for w in resolved.weights}
    assert bits[Q0] == 8  # exact beats regexes that come later
    assert bits[K0] == 4  # the last matching regex beats an earlier one
    assert bits[DOWN0] == 2 and bits["model.layers.1.mlp.down_proj"] == 3
    assert bits["lm_head"] == 5  # the default comes last


def test_unnamed_modules_are_kept_without_a_default() -> None:
    resolved = applied(modules={DOWN0: THREE, K0: {"bits": 16}})
    assert [w.name for w in resolved.weights] == [DOWN0]
    assert resolved.kept[K0] == "plan: 16 bits" and resolved.kept[Q0] == "no rule"
    assert set(resolved.kept) == {s.name for s in linears()} - {DOWN0}


ZERO_KINDS = {
    "asymmetric": ({"bits": 3}, {}, "int"),
    "float": ({"bits": 3, "zero": "float"}, {}, "float"),
    "symmetric": ({"bits": 3, "symmetric": True}, {}, "none"),
    "segment symmetric": ({"bits": 3, "zero": "float"}, {"symmetric": True}, "none"),
    "segment asymmetric": ({"bits": 3, "symmetric": True}, {"symmetric": False}, "int"),
    "segment zero": ({"bits": 3, "symmetric": True}, {"zero": "float"}, "float"),
    "half": ({"bits": 3, "zero": "half"}, {}, "half"),
    "min": ({"bits": 3, "zero": "min"}, {}, "min"),
    "none": ({"bits": 3, "zero": "none"}, {}, "none"),
    "symmetric half": ({"bits": 3, "zero": "half", "symmetric": True}, {}, "half"),
    "segment symmetric as the rule": ({"bits": 3, "zero": "half"}, {"symmetric": True}, "half"),
    "segment asymmetric in half": ({"bits": 3, "zero": "half"}, {"symmetric": False}, "int"),
    "segment symmetric in min": ({"bits": 3, "zero": "min"}, {"symmetric": True}, "none"),
    "segment half": ({"bits": 3, "zero": "min"}, {"zero": "half", "symmetric": True}, "half"),
}


@pytest.mark.parametrize("case", ZERO_KINDS)
def test_zero_kinds(case: str) -> None:
    rule, override, kind = ZERO_KINDS[case]
    if override:
        rule = {**rule, "segments": [{"bits": 3, **override}]}
    assert layouts(applied(modules={Q0: rule}))[Q0][0][-1] == kind


# segments -> [n0, n1, k0, k1, bits, group_size, zero] of down_proj (256 x 640), module: bits 3, group 64
SEGMENTS = {
    "whole": ([{"bits": 5}], [[0, 256, 0, 640, 5, 64, "int"]]),
    "columns": (
        [{"bits": 2, "cols": [128, None], "group_size": -1}, {"bits": 8, "cols": [0, 128], "group_size": 32}],
        [[0, 256, 0, 128, 8, 32, "int"], [0, 256, 128, 640, 2, 512, "int"]],
    ),
    "rows, cut anywhere": (
        [{"bits": 4, "rows": [0, 50]}, {"bits": 3, "rows": [50, None]}],
        [[0, 50, 0, 640, 4, 64, "int"], [50, 256, 0, 640, 3, 64, "int"]],
    ),
    "a column strip through two bands": (
        [
            {"bits": 8, "cols": [0, 64]},
            {"bits": 4, "rows": [0, 128], "cols": [64, None]},
            {"bits": 2, "rows": [128, 256], "cols": [64, 640]},
        ],
        [
            [0, 128, 0, 64, 8, 64, "int"],
            [0, 128, 64, 640, 4, 64, "int"],
            [128, 256, 0, 64, 8, 64, "int"],
            [128, 256, 64, 640, 2, 64, "int"],
        ],
    ),
}


@pytest.mark.parametrize("case", SEGMENTS)
def test_segments(case: str) -> None:
    segments, expected = SEGMENTS[case]
    assert layouts(applied(modules={DOWN0: {"bits": 3, "segments": segments}}))[DOWN0] == expected


def test_last_column_of_an_odd_width_is_a_cut() -> None:
    spec = LinearSpec("a", 10, 172, "a.weight")
    rule = {"bits": 3, "segments": [{"bits": 8, "cols": [0, 128]}, {"bits": 2, "cols": [128, 172], "group_size": 44}]}
    assert layouts(applied([spec], modules={"a": rule}))["a"][1] == [0, 10, 128, 172, 2, 44, "int"]


def test_perm_reaches_member_and_layout() -> None:
    perm = list(range(255, -1, -1))
    (weight,) = applied(modules={Q0: {"bits": 3, "perm": perm}}).weights
    assert weight.layout.permuted and weight.members[0].perm == tuple(perm)


def test_fuse_of_different_widths() -> None:
    resolved = applied(
        default=THREE, modules={"re:.*v_proj": {"bits": 5, "symmetric": True}, "lm_head": {"bits": 16}}, fuse=[QKV]
    )
    names = [w.name for w in resolved.weights]
    assert names[:2] == ["model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj"]
    fused = resolved.weights[0]
    assert fused.fused and [m.spec.name for m in fused.members] == [Q0, K0, V0]
    assert [m.layout.out_features for m in fused.members] == [256, 128, 128]
    assert fused.layout.out_features == 512
    assert layouts(resolved)[fused.name] == [
        [0, 256, 0, 256, 3, 64, "int"],
        [256, 384, 0, 256, 3, 64, "int"],
        [384, 512, 0, 256, 5, 64, "none"],
    ]


def test_fuse_order_is_the_rules_and_kept_parents_are_left() -> None:
    fuse = [{"name": "vq", "members": ["v_proj", "q_proj"]}]
    resolved = applied(default=THREE, modules={"re:model.layers.1.*": {"bits": 16}}, fuse=fuse)
    assert [w.name for w in resolved.weights if w.fused] == ["model.layers.0.self_attn.vq"]
    assert [m.spec.name for m in resolved.weights[0].members] == [V0, Q0]


def test_fuse_at_the_top_of_a_model() -> None:
    specs = [LinearSpec(n, 64, 64, f"{n}.weight") for n in ("w1", "w2")]
    resolved = applied(specs, default=THREE, fuse=[{"name": "w12", "members": ["w1", "w2"]}])
    assert [w.name for w in resolved.weights] == ["w12"]


def test_sizes_are_exact() -> None:
    resolved = applied(default={"bits": 3, "group_size": 64}, fuse=[QKV])
    assert resolved.size() == sum((w.layout.size() for w in resolved.weights), SizeBreakdown())
    # Every N and K here is a multiple of 64, so there is no padding: 3 bits a code, 16 + 8 bits a group of 64.
    count = sum(s.out_features * s.in_features for s in linears())
    assert resolved.size().weights == count
    assert resolved.size().total_bits == count * 3 + count // 64 * 24
    assert resolved.size().padding == 0


def test_experts_are_ordinary_names() -> None:
    specs = [LinearSpec(f"layers.0.experts.{e}.{w}", 64, 64, "t") for e in range(3) for w in ("w1", "w3")]
    resolved = applied(
        specs,
        default={"bits": 2},
        modules={"layers.0.experts.1.w1": {"bits": 4}},
        fuse=[{"name": "w13", "members": ["w1", "w3"]}],
    )
    bits = {w.name: [m.layout.segments[0].bits for m in w.members] for w in resolved.weights}
    assert bits == {f"layers.0.experts.{e}.w13": [4 if e == 1 else 2, 2] for e in range(3)}


def with_embedding(**plan: object) -> ResolvedPlan:
    """The linears behind an embedding of 512 rows that the head and a second embedding share."""
    shared = ("lm_head", "decoder.embed")
    return applied([LinearSpec("embed", 512, 256, "embed.weight", embedding=True, shared=shared), *linears()], **plan)


def test_embeddings_are_packed_where_a_plan_names_them() -> None:
    for modules in ({}, {"re:.*": {"bits": 4}}, {"re:embed|lm_head": {"bits": 4}}, {"re:.*": {"bits": 16}}):
        resolved = with_embedding(default=THREE, modules=modules)
        assert all(weight.embedding is None for weight in resolved.weights) and "embed" not in resolved.kept
    for modules in ({"embed": {"bits": 4}}, {"re:emb.*": {"bits": 4}}):
        first, *others = with_embedding(default=THREE, modules=modules).weights
        assert (first.name, first.embedding) == ("embed", Embedding(("lm_head", "decoder.embed")))
        assert first.layout.segments[0].bits == 4 and "lm_head" not in {weight.name for weight in others}
    resolved = with_embedding(modules={"embed": {"bits": 16}})
    assert resolved.kept["embed"] == "plan: 16 bits" and not resolved.weights


def test_a_tied_head_has_a_rule_of_its_own_where_the_plan_names_it() -> None:
    for rule, shares in (({"bits": 4}, True), ({"bits": 8}, False), ({"bits": 4, "group_size": 32}, False)):
        resolved = with_embedding(modules={"embed": {"bits": 4}, "re:lm_.*": rule})
        names = [weight.name for weight in resolved.weights]
        assert names == (["embed"] if shares else ["embed", "lm_head"])
        users = resolved.weights[0].embedding
        assert users is not None and users.shared == (("lm_head",) if shares else ()) + ("decoder.embed",)
    with pytest.raises(PlanError, match=r"lm_head is kept \(plan: 16 bits\) and shares its weight with embed"):
        with_embedding(modules={"embed": {"bits": 4}, "lm_head": {"bits": 16}})


def test_float8_has_its_exact_size_and_its_own_list() -> None:
    rule = {"bits": 8, "dtype": "float8_e4m3fn"}
    resolved = applied(default=THREE, modules={DOWN0: rule})
    assert list(resolved.floats) == [DOWN0] and DOWN0 not in {weight.name for weight in resolved.weights}
    codes = sum((weight.layout.size() for weight in resolved.weights), SizeBreakdown())
    assert resolved.size().total_bytes - codes.total_bytes == 256 * 640 + 4 * 256
    tied = with_embedding(modules={"embed": {"bits": 4}, "lm_head": rule})
    users = tied.weights[0].embedding
    assert list(tied.floats) == ["lm_head"] and users is not None and users.shared == ("decoder.embed",)
    with pytest.raises(PlanError, match="q_proj is kept .float8_e4m3fn. and others are not"):
        applied(default=THREE, modules={Q0: rule}, fuse=[QKV])


def down(segments: list[dict[str, object]]) -> dict[str, object]:
    return {"modules": {DOWN0: {"bits": 3, "segments": segments}}}


# plan, words of the refusal
REFUSED = {
    "exact name": ({"modules": {"model.layers.0.self_attn.q_prj": THREE}}, ["q_prj", "did you mean", Q0]),
    "regex": ({"modules": {"re:model.layers.9.*": THREE}}, ["re:model.layers.9.*", "matches none of the model's 11"]),
    "regex of a part": ({"modules": {"re:q_proj": THREE}}, ["must match the whole name"]),
    "group": ({"default": {"bits": 3, "group_size": 48}}, [Q0, "group_size=48", "K=256", "remainder 16", "32, 64"]),
    "group of a segment": (
        down([{"bits": 3, "cols": [0, 128], "group_size": 256}, {"bits": 3, "cols": [128, None]}]),
        [DOWN0, "group_size=256", "columns 0..128", "K=640"],
    ),
    "short of columns": (down([{"bits": 3, "cols": [0, 576]}]), [DOWN0, "rows 0..256, columns 576..640 are missing"]),
    "short of rows": (down([{"bits": 3, "rows": [0, 255]}]), [DOWN0, "rows 255..256, columns 0..640 are missing"]),
    "hole": (
        down([{"bits": 3, "cols": [0, 64]}, {"bits": 3, "cols": [128, None]}]),
        [DOWN0, "columns 64..128 are missing"],
    ),
    "overlap": (
        down([{"bits": 3, "cols": [0, 192]}, {"bits": 3, "cols": [128, None]}]),
        [DOWN0, "columns 128..192 are covered twice"],
    ),
    "outside": (down([{"bits": 3, "cols": [0, 704]}]), [DOWN0, "columns 0..704", "640 columns"]),
    "column cut": (
        down([{"bits": 3, "cols": [0, 100]}, {"bits": 3, "cols": [128, None]}]),
        [DOWN0, "columns 0..100", "multiples of 64; 100 is not"],
    ),
    "row cut through a neighbour": (
        down(
            [
                {"bits": 8, "cols": [0, 64]},
                {"bits": 3, "rows": [0, 100], "cols": [64, None]},
                {"bits": 3, "rows": [100, None], "cols": [64, None]},
            ]
        ),
        [DOWN0, "rows 0..256, columns 0..64", "cut at row 100", "multiple of 64"],
    ),
    "int and float zeros": (
        down([{"bits": 3, "cols": [0, 64], "zero": "float"}, {"bits": 3, "cols": [64, None], "zero": "int"}]),
        [DOWN0, "integer and float zeros"],
    ),
    "perm too short": ({"modules": {Q0: {"bits": 3, "perm": [0, 1]}}}, [Q0, "2 entries", "K=256"]),
    "perm repeats": (
        {"modules": {Q0: {"bits": 3, "perm": [0, 0, *range(2, 256)]}}},
        [Q0, "not a permutation", "perm[1]=0 appears twice"],
    ),
    "perm outside": (
        {"modules": {Q0: {"bits": 3, "perm": [*range(255), 256]}}},
        [Q0, "perm[255]=256 is not in 0..255"],
    ),
    "fuse nowhere": ({"default": THREE, "fuse": [{"name": "f", "members": ["a", "b"]}]}, ["'f' applies nowhere"]),
    "fuse of kept": ({"fuse": [QKV]}, ["'qkv_proj' applies nowhere", "kept"]),
    "fuse partly kept": ({"modules": {Q0: THREE}, "fuse": [QKV]}, ["model.layers.0.self_attn", K0, "no rule"]),
    "fuse perm": (
        {"default": THREE, "modules": {Q0: {"bits": 3, "perm": list(range(256))}}, "fuse": [QKV]},
        [Q0, K0, "differ in perm"],
    ),
    "fuse scale dtype": (
        {"default": THREE, "modules": {V0: {"bits": 3, "scale_dtype": "float32"}}, "fuse": [QKV]},
        [Q0, V0, "scale_dtype (float16 and float32)"],
    ),
    "fuse zero kinds": (
        {"default": THREE, "modules": {V0: {"bits": 3, "zero": "float"}}, "fuse": [QKV]},
        ["one dtype", f"{V0} has float16", "has uint8"],
    ),
    "fuse name exists": (
        {"default": THREE, "fuse": [{"name": "o_proj", "members": ["q_proj", "k_proj"]}]},
        ["already has model.layers.0.self_attn.o_proj"],
    ),
    "fuse twice": (
        {"default": THREE, "fuse": [QKV, {"name": "vo_proj", "members": ["v_proj", "o_proj"]}]},
        [f"{V0} is already fused into model.layers.0.self_attn.qkv_proj"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_words(case: str) -> None:
    plan, words = REFUSED[case]
    with pytest.raises(PlanError) as caught:
        applied(**plan)
    for word in words:
        assert word in str(caught.value)


def test_fuse_of_different_k_and_of_some_biases_is_refused() -> None:
    specs = [LinearSpec("a.w1", 64, 64, "t"), LinearSpec("a.w2", 64, 128, "t")]
    with pytest.raises(PlanError, match=r"a.w1 and a.w2 differ in K \(64 and 128\)"):
        applied(specs, default=THREE, fuse=[{"name": "w12", "members": ["w1", "w2"]}])
    with pytest.raises(PlanError, match="differ in bias"):
        applied(linears(bias=("q_proj",)), default=THREE, fuse=[QKV])
    assert applied(linears(bias=("q_proj", "k_proj", "v_proj")), default=THREE, fuse=[QKV]).weights[0].fused


def test_repeated_linear_is_refused() -> None:
    spec = LinearSpec("a", 64, 64, "t")
    with pytest.raises(PlanError, match="repeats a name"):
        applied([spec, spec], default=THREE)
