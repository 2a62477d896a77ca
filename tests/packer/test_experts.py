"""Mixture models from files to files: every expert planned, packed with its own widths, loaded and counted."""

import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mpq_kernels as mpq
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.evaluate.synthetic import config_linears, synthetic_model
from mpq_kernels.nn.replace import replace_linears
from mpq_kernels.plan.resolve import resolve
from tests.made.checkpoints import MIXTURES, tiny_model
from tests.made.commands import Runner
from tests.made.mixtures import dequantized_twin, expert_plan, generate, packed_experts
from tests.made.packed import check_kept, check_packed

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1"
DOWN = "model.layers.0.block_sparse_moe.experts.down"
KEEP = {r"re:.*\.experts\.\d+\..*": {"bits": 16}}


@pytest.fixture(scope="module", params=MIXTURES)
def packed_family(request, tmp_path_factory):
    """(family, dense directory, packed directory, report) of a tiny mixture packed under expert_plan."""
    root = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, root / "source", max_shard_size="60KB")
    plan = expert_plan(root / "source")
    report = mpq.pack(root / "source", root / "out", plan, quantizer="rtn", max_shard_bytes=60_000)
    return request.param, root / "source", root / "out", report


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A tiny Mixtral on disk: two layers of three experts."""
    path = tmp_path_factory.mktemp("mixture")
    return path, tiny_model("mixtral", path)


def test_generation_equals_the_dequantized_model(packed_family):
    family, source, out, _ = packed_family
    model = mpq.load(out)
    assert len(packed_experts(model)) == (1 if family.startswith("deepseek") else 2)
    assert (
        not any("experts" in name for name, _ in model.named_parameters() if "shared" not in name)
        or family == "gpt_oss"
    )
    packed, dense = generate(model), generate(dequantized_twin(model, source))
    assert torch.equal(packed.sequences, dense.sequences)
    for a, b in zip(packed.scores, dense.scores, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()  # fp32 sums in another order: tens of roundings of 2**-24


def test_packed_experts_are_the_quantizer_s_bit_for_bit(packed_family):
    family, source, out, report = packed_family
    opened, packed = check_packed(source, out, expert_plan(source))
    check_kept(opened, packed)
    size = resolve(expert_plan(source), opened.linears()).size()
    assert packed.size().packed == size == report.packed
    widths = {s.bits for name, m in packed.modules.items() if m.experts for s in m.layout.segments}
    assert widths == set(range(1, 9)), family
    assert all(module.experts is not None for name, module in packed.modules.items() if ".experts.gate_up" in name)


def test_every_stored_weight_is_packed_or_kept_with_a_reason(packed_family):
    _, source, out, report = packed_family
    model, packed = mpq.load(out), PackedCheckpoint.open(out)
    assert report.kept == {"lm_head": "plan: 16 bits"}
    for name in packed.kept_tensors():
        assert "experts" not in name or "shared_experts" in name, name
    routers = [n for n, m in model.named_modules() if type(m).__name__.lower().endswith("topkrouter")]
    assert routers and all(model.get_submodule(name).weight.dtype == torch.float32 for name in routers)


def test_saving_gives_back_the_same_tensors(packed_family, tmp_path):
    _, _, out, _ = packed_family
    model = mpq.load(out)
    model.save_pretrained(tmp_path / "again")
    again = mpq.load(tmp_path / "again")
    state, before = again.state_dict(), model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)
    stored = PackedCheckpoint.open(tmp_path / "again")
    assert stored.packing == PackedCheckpoint.open(out).packing


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_layers_with_kept_experts_beside_packed_ones(family, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    dense = tiny_model(family, source)
    rules = {r"re:.*layers\.1.*\.experts\.\d+\..*": {"bits": 3, "group_size": 16}}
    report = mpq.pack(source, out, mpq.Plan.from_dict({"version": 1, "modules": rules}), quantizer="rtn")
    model = mpq.load(out)
    model.save_pretrained(tmp_path / "again")
    assert len(report.modules) == 2 and len(packed_experts(model)) == 1
    for loaded in (model, mpq.load(tmp_path / "again")):
        kept = loaded.model.layers[0].mlp.experts
        assert torch.equal(kept.gate_up_proj, dense.model.layers[0].mlp.experts.gate_up_proj)
        assert torch.equal(generate(loaded).sequences, generate(dequantized_twin(model, source)).sequences)


def test_experts_stored_merged_give_the_same_weights(tmp_path):
    dense = tiny_model("qwen3_moe", tmp_path / "apart")
    shutil.copytree(tmp_path / "apart", tmp_path / "merged")
    save_file(dense.state_dict(), tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    plan = expert_plan(tmp_path / "apart")
    for form in ("apart", "merged"):
        mpq.pack(tmp_path / form, tmp_path / f"{form}_out", plan, quantizer="hqq")
    stored = [load_file(tmp_path / f"{form}_out" / "model.safetensors") for form in ("apart", "merged")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])
    assert torch.equal(*(generate(mpq.load(tmp_path / f"{form}_out")).sequences for form in ("apart", "merged")))


def test_a_plan_may_keep_the_experts(mixture, tmp_path):
    path, model = mixture
    plan = mpq.Plan.from_dict({"version": 1, "default": {"bits": 8, "group_size": 32}, "modules": KEEP})
    report = mpq.pack(path, tmp_path / "out", plan, quantizer="rtn")
    assert report.kept[EXPERT] == "plan: 16 bits" and len(report.kept) == 18
    loaded = mpq.load(tmp_path / "out")
    state = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if "experts" in name:
            assert torch.equal(state[name], tensor), name


def test_uniform_plans_pack_experts_and_keep_routers(tmp_path):
    tiny_model("qwen2_moe", tmp_path / "m")
    plan = mpq.Plan.uniform(tmp_path / "m", bits=4, group_size=16)
    resolved = resolve(plan, DenseCheckpoint.open(tmp_path / "m").linears())
    gates = [f"model.layers.{layer}.mlp.shared_expert_gate" for layer in (0, 1)]
    assert set(resolved.kept) == {"lm_head", *gates}
    assert sum(len(weight.members) for weight in resolved.weights if weight.experts) == 2 * 4 * 3


def without(rules: dict, **more) -> dict:
    return {"version": 1, "default": {"bits": 4, "group_size": 32}, "modules": rules, **more}


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (without({EXPERT: {"bits": 16}}), r"block_sparse_moe\.experts: .* is packed and .*experts\.2\.w1 is kept"),
        (without({EXPERT: {"bits": 4, "group_size": 32, "zero": "float"}}), "zeros of one packed weight"),
        (without({EXPERT: {"bits": 4, "group_size": 32, "scale_dtype": "float32"}}), "differ in scale_dtype"),
        (without({EXPERT: {"bits": 4, "group_size": 32, "perm": [*range(63, -1, -1)]}}), "differ in perm"),
        (without({}, fuse=[{"name": "w13", "members": ["w1", "w3"]}]), "experts are stacked without a rule"),
        (without({EXPERT: {"bits": 4, "group_size": 60}}), r"experts\.2\.w1: group_size=60 does not divide K=64"),
    ],
)
def test_plans_that_cannot_be_stacked_are_refused(mixture, plan, words):
    with pytest.raises(mpq.PlanError, match=words):
        resolve(mpq.Plan.from_dict(plan), DenseCheckpoint.open(mixture[0]).linears())


def test_calibration_beside_kept_experts(mixture, tmp_path):
    tokens = mpq.Calibration(tokens=torch.arange(3, 35)[None])
    kept = mpq.Plan.from_dict(without(KEEP))
    report = mpq.pack(mixture[0], tmp_path / "out", kept, quantizer="gptq", calibration=tokens)
    assert EXPERT in report.kept and len(report.modules) == 9


def test_one_expert_is_in_memory_at_a_time(mixture, tmp_path, monkeypatch):
    from mpq_kernels.packer import job

    alive, most = weakref.WeakSet(), []

    def watched(*args, **kwargs):
        quantized = quantize(*args, **kwargs)
        alive.add(quantized)
        most.append(len(alive))
        return quantized

    quantize = job.quantize_weight
    monkeypatch.setattr(job, "quantize_weight", watched)
    mpq.pack(mixture[0], tmp_path / "out", mpq.Plan.from_dict(without({})), quantizer="rtn")
    assert len(most) == 18 + 9 and max(most) == 1


def test_large_parameters_that_stay_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mpq_kernels.packer.report.LARGE", 5000)
    tiny_model("mixtral", tmp_path / "m")
    rules = {r"re:.*layers\.0\..*\.experts\.\d+\..*": {"bits": 4, "group_size": 32}}
    report = mpq.pack(tmp_path / "m", tmp_path / "out", mpq.Plan.from_dict({"version": 1, "modules": rules}))
    named = {parameter.name: (parameter.elements, parameter.reason) for parameter in report.large}
    assert named == {
        "model.layers.1.mlp.experts.gate_up_proj": (3 * 2 * 96 * 64, "no rule"),
        "model.layers.1.mlp.experts.down_proj": (3 * 96 * 64, "no rule"),
        "model.embed_tokens.weight": (160 * 64, "is looked up by row (Embedding), and no rule names it"),
        "lm_head.weight": (160 * 64, "no rule"),
    }
    assert report.to_dict()["large"][0]["reason"] == "no rule"


def test_a_packed_head_leaves_the_embedding_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mpq_kernels.packer.report.LARGE", 10_000)
    tiny_model("llama", tmp_path / "m", tied=True)
    plan = mpq.Plan.from_dict({"version": 1, "modules": {"lm_head": {"bits": 4}}})
    report = mpq.pack(tmp_path / "m", tmp_path / "out", plan, quantizer="rtn")
    named = {parameter.name: parameter.reason for parameter in report.large}
    assert named.pop("model.embed_tokens.weight") == "is looked up by row (Embedding), and no rule names it"
    assert set(named.values()) == {"no rule"} and "model.layers.0.mlp.down_proj.weight" in named


@pytest.fixture
def copied(mixture, tmp_path):
    """A packed Mixtral that a test may damage."""
    mpq.pack(mixture[0], tmp_path / "out", mpq.Plan.from_dict(without({})), quantizer="rtn")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(num_local_experts=6), "packed as 3 experts, 576 x 64 in all; the model wants 6"),
        (lambda c: c.update(intermediate_size=64), "the model wants 3, 384 x 64"),
        (lambda c: c["quantization_config"]["modules"].pop(DOWN), "has no place for it|take a packed gate_up and a"),
        (lambda c: module(c)["experts"].update(count=2), "2 experts must have equally many members|two experts"),
        (
            lambda c: module(c)["experts"].update(module="model.layers.0.other.experts"),
            "model.layers.0.mlp.experts take a packed gate_up and a packed down",
        ),
        (
            lambda c: [module(c, leaf)["experts"].update(module="model.layers.0.mlp") for leaf in ("gate_up", "down")],
            "packed for the experts model.layers.0.mlp, but the model has a MixtralSparseMoeBlock there",
        ),
        (
            lambda c: module(c)["experts"].update(module="model.layers.1.mlp.experts"),
            r"layers\.1\.mlp\.experts has two packed weights named down",
        ),
        (lambda c: module(c).update(experts=3), "experts=3 is not a module and a count"),
        (lambda c: module(c)["experts"].update(count="3"), "is not a module and a count"),
    ],
)
def test_configs_that_do_not_fit_are_refused(copied, change, words):
    config = json.loads((copied / "config.json").read_text())
    change(config)
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(mpq.CheckpointError, match=words):
        mpq.load(copied)


def module(config: dict, leaf: str = "down") -> dict:
    return config["quantization_config"]["modules"][DOWN.replace("down", leaf)]


def test_replacing_in_memory_gives_the_packed_model(packed_family):
    _, source, out, _ = packed_family
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    report = replace_linears(model, expert_plan(source), "rtn")
    assert report.left["lm_head"] == "plan: 16 bits"
    assert not any("experts" in name and "shared" not in name for name in report.left)
    loaded = mpq.load(out)
    assert torch.equal(generate(model).sequences, generate(loaded).sequences)
    for ours, theirs in zip(packed_experts(model), packed_experts(loaded), strict=True):
        assert torch.equal(ours.gate_up.qweight, theirs.gate_up.qweight)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_synthetic_mixtures_run(family, tmp_path):
    tiny_model(family, tmp_path / "m")
    plan = mpq.Plan.uniform(config_linears(tmp_path / "m"), bits=3, group_size=16)
    model = synthetic_model(tmp_path / "m" / "config.json", plan)
    assert len(packed_experts(model)) == 2 and torch.isfinite(generate(model, 3).scores[0]).all()


def test_commands_count_experts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mpq_kernels.packer.report.LARGE", 10_000)
    run = Runner(capsys)
    source, out = tmp_path / "m", tmp_path / "out"
    tiny_model("qwen2_moe", source)
    printed = run("pack", source, out, "--bits", "4", "--group-size", "16", "--quantizer", "rtn", "--quiet").out
    assert "large parameters that were not packed" in printed and "lm_head.weight" in printed
    modules = {m["name"]: m for m in run("inspect", out, "--json").json()["modules"]}
    down = modules["model.layers.1.mlp.experts.down"]
    assert down["experts"] == {"module": "model.layers.1.mlp.experts", "count": 4}
    assert [member[0] for member in down["members"]] == [f"{e}.down_proj" for e in range(4)]
    layers = run("verify", out, "--against", source, "--json").json()["layers"]
    errors = {layer["name"]: layer["relative_error"] for layer in layers if ".experts." in layer["name"]}
    assert len(errors) == 2 * 4 * 3 and all(0 < error < 0.2 for error in errors.values())
    (tmp_path / "plan.json").write_text(mpq.Plan.uniform(source, bits=4, group_size=16).to_json())
    sizes = [run("plan", "size", tmp_path / "plan.json", m, "--json").json() for m in (source, source / "config.json")]
    total = run("inspect", out, "--json").json()["total"]
    assert sizes[0]["packed"] == sizes[1]["packed"] == {key: total[key] for key in sizes[0]["packed"]}
