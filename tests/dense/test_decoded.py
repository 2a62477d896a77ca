"""Checkpoints that are stored in fp8 and MXFP4: the values of transformers' own dequantization, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import mpq_kernels as mpq
from mpq_kernels.calibrate.calibration import Calibration
from mpq_kernels.checkpoint import PackedCheckpoint
from mpq_kernels.dense import decoded
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.errors import CheckpointError
from tests.made.quantized_sources import fp8_checkpoint, mxfp4_checkpoint, rewrite, to_fp8

MADE = {"fp8": fp8_checkpoint, "mxfp4": mxfp4_checkpoint}
IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module", params=MADE)
def source(request, tmp_path_factory):
    return MADE[request.param](tmp_path_factory.mktemp(request.param) / "source")


def stored(path):
    return load_file(path / "model.safetensors")


def test_every_tensor_is_that_of_transformers(source):
    opened, raw = DenseCheckpoint.open(source), stored(source)
    made = 0
    for name in opened.tensors:
        if f"{name}_scale_inv" in raw:
            wanted = Fp8Dequantize(None)._dequantize_one(raw[name], raw[f"{name}_scale_inv"], torch.bfloat16)
        elif f"{name}_blocks" in raw:
            wanted = convert_moe_packed_tensors(raw[f"{name}_blocks"], raw[f"{name}_scales"])
        else:
            assert torch.equal(opened.read(name), raw[name])
            continue
        made += 1
        assert torch.equal(opened.read(name), wanted) and opened.tensors[name].shape == wanted.shape
    assert made >= 4 and opened.decodes


def test_the_model_is_that_of_from_pretrained(source, monkeypatch):
    """In pieces of a few rows, which no block of scales may notice."""
    monkeypatch.setattr(decoded, "CHUNK", 700)
    opened = DenseCheckpoint.open(source)
    state = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    for spec in opened.linears():
        weight = opened.weight(spec)
        if spec.expert is None:
            wanted = state[f"{spec.name}.weight"]
        else:
            name = "down_proj" if spec.expert.part == "down" else "gate_up_proj"
            held = state[f"{spec.expert.module}.{name}"][spec.expert.index]
            if spec.expert.cut is not None:
                wanted = spec.expert.cut.weight(state[f"{spec.expert.module}.{name}"])
            else:
                half = held.shape[0] // 2
                wanted = {"down": held, "gate": held[:half], "up": held[half:]}[spec.expert.part]
        assert torch.equal(weight, wanted), spec.name


def test_packing(source, tmp_path):
    """Logits of the packed model with wide codes are near those of transformers; nothing of the source's form stays."""
    plan = mpq.Plan.uniform(source, bits=8, group_size=16)
    report = mpq.pack(source, tmp_path / "packed", plan, quantizer="rtn")
    held = PackedCheckpoint.open(tmp_path / "packed")
    assert held.config["quantization_config"]["quant_method"] == "mpq"
    assert not any(name.endswith(("_scale_inv", "_blocks", "_scales")) for name in held.tensors)
    assert report.decoded == () and report.source_bytes == sum(t.nbytes for t in stored(source).values())
    with torch.no_grad():
        got = mpq.load(tmp_path / "packed")(IDS).logits.float()
        wanted = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()(IDS).logits.float()
    assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_what_is_kept_is_stored_in_16_bits(source, tmp_path):
    name = "model.layers.1.self_attn.o_proj"
    plan = mpq.Plan.from_dict({"version": 1, "modules": {name: {"bits": 4, "group_size": 16}}})
    report = mpq.pack(source, tmp_path / "packed", plan, quantizer="rtn")
    opened, held = DenseCheckpoint.open(source), PackedCheckpoint.open(tmp_path / "packed")
    assert report.decoded and set(report.decoded) < set(held.kept_tensors())
    for kept in held.kept_tensors():
        assert held.tensors[kept].dtype == torch.bfloat16 or kept.endswith("e_score_correction_bias")
        assert torch.equal(held.read(kept), opened.read(kept))
    assert torch.isfinite(mpq.load(tmp_path / "packed")(IDS).logits).all()


def test_calibration_reads_the_same_values(source, tmp_path):
    """gptq in the last layer sees what all before it make, as it does in a checkpoint of the same values in 16 bits."""
    opened = DenseCheckpoint.open(source)
    (tmp_path / "wide").mkdir()
    config = {key: value for key, value in opened.config.items() if key != "quantization_config"}
    save_file(
        {name: opened.read(name).contiguous() for name in opened.tensors}, tmp_path / "wide" / "model.safetensors"
    )
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config))
    rules = {"model.layers.1.self_attn.o_proj": {"bits": 2, "group_size": 16}}
    rows = torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(0))
    words = {"quantizer": "gptq", "calibration": Calibration(tokens=rows)}
    for path in (source, tmp_path / "wide"):
        mpq.pack(path, tmp_path / f"{path.name} packed", mpq.Plan.from_dict({"version": 1, "modules": rules}), **words)
    one, other = (stored(tmp_path / f"{name} packed") for name in ("source", "wide"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("shape", [(192, 320), (576, 128), (64, 64), (130, 70)])
def test_ragged_blocks(shape, tmp_path):
    """Blocks of 128 that do not divide the weight, as DeepSeek-V3's kv_a_proj_with_mqa has."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    codes, scales = to_fp8(weight, (128, 128))
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    rewrite(tmp_path, {"w.weight": codes, "w.weight_scale_inv": scales, "x": weight}, config)
    opened = DenseCheckpoint.open(tmp_path)
    wanted = _dequantize_fp8_weight(codes, scales, [128, 128], torch.float32).bfloat16()
    assert torch.equal(opened.read("w.weight"), wanted)


FORMS = {
    "no dtype": (lambda q, s: (q, s), "weight_scale_inv", [16, 16]),
    "one scale": (lambda q, s: (q, torch.tensor(0.37)), "weight_scale_inv", None),
    "exponents": (lambda q, s: (q, torch.randint(120, 130, s.shape, dtype=torch.uint8)), "weight_scale_inv", [16, 16]),
    "e8m0": (lambda q, s: (q, s.to(torch.float8_e8m0fnu)), "weight_scale_inv", [16, 16]),
    "bf16 scales": (lambda q, s: (q, s.bfloat16()), "weight_scale_inv", [16, 16]),
    "another name": (lambda q, s: (q, s), "scale", [16, 16]),
    "Mistral's name": (lambda q, s: (q, s), "qscale_weight", [16, 16]),
    "fp4": (lambda q, s: (torch.randint(-128, 127, (64, 48), dtype=torch.int8), torch.rand(64, 3)), "scale", [16, 16]),
    "three dimensions": (lambda q, s: (torch.stack([q, q]), torch.stack([s, 2 * s])), "weight_scale_inv", [16, 16]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_fp8(form, tmp_path):
    change, leaf, block = FORMS[form]
    torch.manual_seed(5)
    codes, scales = change(*to_fp8(torch.randn(64, 96).bfloat16(), (16, 16)))
    extra = {"w.activation_scale": torch.tensor(1.0), "n": torch.ones(4).bfloat16()}
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    rewrite(
        tmp_path, {"w.weight": codes, f"w.{leaf}": scales} | extra, {"quant_method": "fp8", "weight_block_size": block}
    )
    if form == "no dtype":  # and that of the scales is none
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    opened = DenseCheckpoint.open(tmp_path)
    assert set(opened.tensors) == {"w.weight", "n"}
    wanted = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    assert torch.equal(opened.read("w.weight"), wanted)
    if codes.dim() == 3:
        assert torch.equal(opened.tensors["w.weight"].read(opened.files, 1), wanted[1:])


def broken(tensors, name, change):
    return {**tensors, name: change(tensors[name])} if change else {k: v for k, v in tensors.items() if k != name}


FAULTS = {
    "no scales": ("fp8", "weight_scale_inv", None, "no file holds its scales"),
    "misshapen scales": ("fp8", "weight_scale_inv", lambda t: torch.ones(7, 5), "are no scales of"),
    "integer scales": ("fp8", "weight_scale_inv", lambda t: t.int(), "are no scales of"),
    "no MXFP4 scales": ("mxfp4", "_scales", None, "no file holds its scales"),
    "other MXFP4 scales": ("mxfp4", "_scales", lambda t: t[:, :, :1], "no MXFP4 blocks of 32"),
    "other MXFP4 blocks": ("mxfp4", "_blocks", lambda t: t[..., :8], "no MXFP4 blocks of 32"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_before_anything_is_read(fault, tmp_path):
    method, leaf, change, message = FAULTS[fault]
    path = MADE[method](tmp_path / "m")
    tensors = stored(path)
    name = next(name for name in tensors if name.endswith(leaf))
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    rewrite(path, broken(tensors, name, change), config)
    with pytest.raises(CheckpointError, match=message):
        DenseCheckpoint.open(path)


@pytest.mark.parametrize("method", ["fbgemm_fp8", "gptq", "compressed-tensors", None, ["fp8"]])
def test_other_forms_are_refused(method, tmp_path):
    path = fp8_checkpoint(tmp_path / "m", "llama")
    rewrite(path, stored(path), {"quant_method": method})
    with pytest.raises(CheckpointError, match=r"only fp8 and mxfp4 are read: `mpq import` takes"):
        DenseCheckpoint.open(path)
