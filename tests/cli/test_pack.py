"""`mpq pack`: what it writes and reports, and what it refuses."""

import shutil
from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file

import mpq_kernels as mpq
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from tests.made.commands import broken_copy


def test_pack_reports_what_it_wrote(run, tmp_path):
    data = run("pack", "dense", tmp_path / "o", "--bits", 2, "--group-size", 32, "--quantizer", "rtn", "--json").json()
    checkpoint = PackedCheckpoint.open(tmp_path / "o")
    size = checkpoint.size()
    assert data["packed"]["total_bytes"] == size.packed.total_bytes
    assert data["file_bytes"] == (tmp_path / "o" / "model.safetensors").stat().st_size
    assert {module["name"] for module in data["modules"]} == set(checkpoint.modules)
    assert {s.bits for m in checkpoint.modules.values() for s in m.layout.segments} == {2}


def test_pack_is_the_library_call(run, tmp_path):
    text = run("pack", "dense", tmp_path / "o", "--plan", "plan.json", "--quantizer", "rtn").out
    mpq.pack("dense", tmp_path / "again", mpq.Plan.from_file("plan.json"), quantizer="rtn")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert "model.layers.0.self_attn.qkv_proj" in text
    assert "plan: 16 bits" in text


def test_tensors_that_the_model_does_not_use_are_named(run, tmp_path):
    shutil.copytree("dense", tmp_path / "more")
    file = tmp_path / "more" / "model.safetensors"
    save_file(load_file(file) | {"v_head.summary.weight": torch.zeros(1, 64)}, file, metadata={"format": "pt"})
    text = run("pack", tmp_path / "more", tmp_path / "o", "--bits", 4, "--group-size", 32, "--quantizer", "rtn").out
    assert "kept, though the model does not use them: v_head.summary.weight" in text


def test_pack_with_calibration(run, tmp_path):
    words = ["--bits", 2, "--group-size", 32, "--quantizer", "gptq"]
    sizes = run("pack", "dense", tmp_path / "o", *words, "--act-order", "--dry-run", "--json").json()
    given = ["--calibration", "text.txt", "--calibration-tokens", 600, "--act-order"]
    data = run("pack", "dense", tmp_path / "o", *words, *given, "--json").json()
    assert data["packed"]["total_bytes"] == sizes["packed"]["total"]
    assert PackedCheckpoint.open(tmp_path / "o").modules["model.layers.0.mlp.up_proj"].layout.permuted
    text = mpq.Calibration.from_file("text.txt", max_tokens=600, act_order=True)
    mpq.pack("dense", tmp_path / "again", mpq.Plan.uniform("dense", 2, 32), "gptq", text)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    run("pack", "dense", tmp_path / "hqq", *words[:4], *given[:4])
    mpq.pack("dense", tmp_path / "search", mpq.Plan.uniform("dense", 2, 32), "hqq", replace(text, act_order=False))
    found = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("hqq", "search", "o")]
    assert found[0] == found[1] != found[2]
    for wrong, word in (
        (words, "needs --calibration"),
        ([*words[:4], "--quantizer", "rtn", *given[:2]], "uses no calibration"),
        ([*words[:4], "--act-order"], "--act-order goes with --quantizer gptq, not with hqq"),
        ([*words[:4], "--calibration-tokens", 3], "goes with --calibration"),
    ):
        assert word in run.misuse("pack", "dense", tmp_path / "p", *wrong)


def test_pack_leaves_existing_output_alone(run, tmp_path):
    out = tmp_path / "o"
    run("pack", "dense", out, "--bits", 4, "--quantizer", "rtn")
    before = (out / "model.safetensors").read_bytes()
    assert "not empty" in run("pack", "dense", out, "--bits", 2, code=1).err
    assert (out / "model.safetensors").read_bytes() == before
    run("pack", "dense", out, "--bits", 2, "--quantizer", "rtn", "--overwrite")
    assert (out / "model.safetensors").stat().st_size < len(before)


def test_bad_models_are_refused(run, tmp_path, space):
    def poison(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")

    nan = broken_copy(space, tmp_path, "dense", poison)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(space / "dense" / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    cut = tmp_path / "cut"
    shutil.copytree(space / "dense", cut)
    (cut / "model.safetensors").write_bytes((space / "dense" / "model.safetensors").read_bytes()[:-10])
    for model, word in ((nan, "up_proj"), (pickled, "pickle"), (cut, "model.safetensors"), (tmp_path / "none", "none")):
        refused = run("pack", model, tmp_path / "o", "--bits", 4, "--quantizer", "rtn", code=1)
        assert refused.err.startswith("mpq: ")
        assert word in refused.err
        assert not (tmp_path / "o").exists()
    assert "already quantized" in run("pack", "packed", tmp_path / "o", "--bits", 4, code=1).err
