"""Linears that a plan stores in float8 with a scale for each row: values, packing, loading, saving, refusals."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import mpq_kernels as mpq
from mpq_kernels.checkpoint import PackedCheckpoint
from mpq_kernels.errors import CheckpointError, PlanError, QuantizeError, UnsupportedError
from mpq_kernels.format.float8 import bad_float8, float8_error, from_float8, to_float8
from mpq_kernels.nn import Float8Linear
from tests.made.checkpoints import tiny_model

FP8 = {"bits": 8, "dtype": "float8_e4m3fn"}
DOWN = "model.layers.1.mlp.down_proj"
Q = "model.layers.0.self_attn.q_proj"
IDS = torch.arange(3, 15)[None]


def plan_of(*names, **rules):
    modules = dict.fromkeys(names, FP8) | rules
    return mpq.Plan.from_dict({"version": 1, "default": {"bits": 4, "group_size": -1}, "modules": modules})


def pack(path, *names, family="qwen2", tied=False, **words):
    tiny_model(family, path / "source", tied=tied)
    mpq.pack(path / "source", path / "packed", plan_of(*names), quantizer="rtn", **words)
    return path / "packed"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_values_are_nearest_and_rows_have_their_own_scale():
    torch.manual_seed(0)
    weight = torch.randn(70, 96) * torch.logspace(-6, 3, 70)[:, None]
    weight[3] = 0
    codes, scales = to_float8(weight)
    assert codes.dtype == torch.float8_e4m3fn and bad_float8(codes, scales) is None
    assert torch.equal(codes.float().abs().amax(1)[torch.arange(70) != 3], torch.full((69,), 448.0))
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    wanted = weight / scales[:, None]
    nearest = (wanted[:, :, None] - every).abs().amin(2)
    assert ((wanted - codes.float()).abs() <= nearest * (1 + 1e-5) + 1e-7).all()
    restored = from_float8(codes, scales, torch.float32)
    relative, largest = float8_error(weight, codes, scales)
    assert relative == pytest.approx(float((restored - weight).norm() / weight.norm()), rel=1e-5)
    assert largest == float((restored - weight).abs().max()) and relative < 0.03
    tiny = torch.full((1, 8), 1e-44)
    assert from_float8(*to_float8(tiny), torch.float32).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_layer(dtype):
    linear = torch.nn.Linear(64, 48).to(dtype)
    layer = Float8Linear.from_tensors(*to_float8(linear.weight.detach()), linear.bias, dtype)
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x.to(dtype))
    dense = from_float8(layer.qweight, layer.scales, dtype)
    assert torch.equal(y, torch.nn.functional.linear(x.to(dtype), dense, linear.bias))
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    moved = copy.deepcopy(layer).half()
    assert moved.qweight.dtype == torch.float8_e4m3fn and moved.scales.dtype == torch.float32
    assert moved.weight.dtype == torch.float16 and moved.weight.shape == (48, 64) and moved.weight.isnan().all()
    with pytest.raises(UnsupportedError, match="without values"):
        Float8Linear(layer.shape, device="meta")(torch.randn(1, 64))


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_packing_loading_and_saving(family, tmp_path):
    packed = pack(tmp_path, DOWN, Q, "lm_head", family=family, max_shard_bytes=40_000)
    held = PackedCheckpoint.open(packed)
    assert set(held.packing.floats) == {DOWN, Q, "lm_head"} and not {DOWN, Q} & set(held.modules)
    assert held.tensors[f"{DOWN}.qweight"].dtype == torch.float8_e4m3fn
    assert "model.layers.0.self_attn.q_proj.bias" in held.tensors or family == "gemma2"
    model = mpq.load(packed)
    assert isinstance(model.get_submodule(DOWN), Float8Linear)
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    for name in (DOWN, Q, "lm_head"):
        codes, scales = to_float8(source.get_submodule(name).weight.detach())
        assert torch.equal(model.get_submodule(name).dequantize(), from_float8(codes, scales, torch.float32))
    memory = copy.deepcopy(source)
    report = mpq.replace_linears(memory, plan_of(DOWN, Q, "lm_head"), "rtn")
    assert "float8" in report.replaced[DOWN]
    torch.testing.assert_close(logits(memory), logits(model))
    model.tie_weights()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(mpq.load(tmp_path / "again")), logits(model))
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(packed)(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_sizes_are_those_of_the_tensors(tmp_path):
    tiny_model("qwen2", tmp_path / "source")
    report = mpq.pack(tmp_path / "source", tmp_path / "packed", plan_of(DOWN, Q), quantizer="rtn")
    held = PackedCheckpoint.open(tmp_path / "packed")
    bytes_of = {module.name: module.bytes for module in report.modules}
    assert bytes_of[DOWN] == sum(held.tensors[f"{DOWN}.{key}"].entry.nbytes for key in ("qweight", "scales"))
    size = held.size()
    assert size.packed == report.packed and sum(bytes_of.values()) == size.packed.total_bytes
    assert size.packed.total_bytes + size.bias + size.kept == sum(t.entry.nbytes for t in held.tensors.values())
    assert dict(report.modules[-1].errors)[DOWN] < 0.05


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    packed = pack(tmp_path, DOWN, Q)
    calls = 0

    def stop(*step):
        nonlocal calls
        calls += 1
        if step[2] == DOWN:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mpq.pack(tmp_path / "source", tmp_path / "other", plan_of(DOWN, Q), quantizer="rtn", progress=stop)
    report = mpq.pack(tmp_path / "source", tmp_path / "other", plan_of(DOWN, Q), quantizer="rtn", resume=True)
    assert report.resumed > 5
    names = [path.name for path in packed.iterdir() if path.name != "mpq_manifest.json"]
    assert all((packed / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in names)


def test_offloading(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="only a program that offloads needs it")
    packed = pack(tmp_path, DOWN, Q)
    wanted = logits(mpq.load(packed))
    moved = accelerate.cpu_offload(mpq.load(packed), execution_device=torch.device("cpu"), offload_buffers=True)
    assert moved.get_submodule(DOWN).qweight.is_meta and torch.equal(logits(moved), wanted)
    split = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    split |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    mapped = AutoModelForCausalLM.from_pretrained(
        packed, device_map=split, offload_folder=tmp_path / "o", offload_buffers=True
    )
    assert torch.equal(logits(mapped), wanted)


def test_plans_that_cannot_be(tmp_path):
    tiny_model("mixtral", tmp_path / "m")
    rules = {r"re:.*\.experts\.\d+\..*": FP8}
    with pytest.raises(PlanError, match="an expert's linear"):
        mpq.pack(tmp_path / "m", tmp_path / "o", mpq.Plan.from_dict({"version": 1, "modules": rules}))
    with pytest.raises(PlanError, match="this is an embedding"):
        mpq.pack(
            tmp_path / "m", tmp_path / "o", mpq.Plan.from_dict({"version": 1, "modules": {"model.embed_tokens": FP8}})
        )
    fused = {"version": 1, "default": {"bits": 4, "group_size": -1}, "modules": {Q: FP8}}
    fused["fuse"] = [{"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]}]
    tiny_model("qwen2", tmp_path / "q")
    with pytest.raises(PlanError, match="float8_e4m3fn"):
        mpq.pack(tmp_path / "q", tmp_path / "o", mpq.Plan.from_dict(fused))
    for bad in ({"bits": 4}, {"perm": [1, 0]}, {"dtype": "float8_e5m2"}):
        with pytest.raises(PlanError):
            mpq.Plan.from_dict({"version": 1, "modules": {Q: FP8 | bad}})


def test_a_nan_in_the_source_is_refused(tmp_path):
    tiny_model("qwen2", tmp_path / "m", tied=False)
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{DOWN}.weight"][1, 2] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(QuantizeError, match="NaN or Inf"):
        mpq.pack(tmp_path / "m", tmp_path / "o", plan_of(DOWN), quantizer="rtn")


def edit(change):
    def apply(packed):
        config = json.loads((packed / "config.json").read_text())
        change(config["quantization_config"]["float8"])
        (packed / "config.json").write_text(json.dumps(config))

    return apply


def store(change):
    def apply(packed):
        tensors = load_file(packed / "model.safetensors")
        change(tensors)
        save_file(tensors, packed / "model.safetensors", {"format": "pt"})

    return apply


FAULTS = {
    "shape": (edit(lambda f: f[DOWN].update(in_features=64)), "quantization_config asks for"),
    "no shape": (edit(lambda f: f[DOWN].pop("bias")), "is no shape and bias"),
    "twice": (edit(lambda f: f.update({"lm_head": f[DOWN]})), "lm_head"),
    "name": (edit(lambda f: f.update({"../x": f[DOWN]})), "is not a module name"),
    "missing": (store(lambda t: t.pop(f"{DOWN}.scales")), "is missing"),
    "bias": (edit(lambda f: f[DOWN].update(bias=True)), "is missing"),
    "NaN": (store(lambda t: t[f"{DOWN}.qweight"].view(torch.uint8)[0].fill_(0x7F)), "qweight holds NaN"),
    "scale": (store(lambda t: t[f"{DOWN}.scales"].fill_(-1.0)), "not positive"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(fault, tmp_path):
    change, message = FAULTS[fault]
    packed = pack(tmp_path, DOWN)
    change(packed)
    with pytest.raises(CheckpointError, match=message):
        mpq.load(packed)


def test_gptq_and_synthetic_models(tmp_path):
    from mpq_kernels.calibrate.calibration import Calibration
    from mpq_kernels.evaluate.speed import ModelFacts
    from mpq_kernels.evaluate.synthetic import synthetic_model

    tiny_model("qwen2", tmp_path / "m", tied=True)
    rows = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(0))
    rules = {"version": 1, "modules": {DOWN: FP8, Q: {"bits": 3, "group_size": -1}}}
    plan = mpq.Plan.from_dict(rules)
    mpq.pack(tmp_path / "m", tmp_path / "o", plan, quantizer="gptq", calibration=Calibration(tokens=rows))
    stored, made = mpq.load(tmp_path / "o"), synthetic_model(tmp_path / "m", plan)
    assert logits(made).isfinite().all() and made.get_submodule(DOWN).scales.min() > 0
    assert ModelFacts.of(stored).packed == ModelFacts.of(made).packed
    assert ModelFacts.of(stored).params == ModelFacts.of(made).params
