"""Packing: what is written is the quantizer's result and the source's own bytes, sized and placed as announced."""

import json
import os
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.errors import CheckpointError
from mpq_kernels.files.safetensors import ALIGNMENT, DTYPES
from mpq_kernels.format.reference import dequantize
from mpq_kernels.packer import job
from mpq_kernels.packer.pack import pack
from mpq_kernels.plan.plan import Plan
from mpq_kernels.plan.resolve import resolve
from tests.made.checkpoints import FAMILIES, tiny_model
from tests.made.packed import UNIFORM, check_kept, check_packed, mixed_plan, small_plan


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "model"
    tiny_model("llama", path, tied=True)
    (path / "tokenizer.json").write_text('{"a": 1}')
    (path / "custom.py").write_text("")
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tied, tmp_path):
    dtype = [torch.float32, torch.float16, torch.bfloat16][list(FAMILIES).index(family) % 3]
    tiny_model(family, tmp_path / "model", tied=tied, dtype=dtype)
    plan = mixed_plan(tmp_path / "model")
    pack(tmp_path / "model", tmp_path / "out", plan, quantizer="rtn", max_shard_bytes=40_000 if tied else 10**9)
    source, packed = check_packed(tmp_path / "model", tmp_path / "out", plan)
    check_kept(source, packed)
    replaced = {spec.tensor for spec in source.linears() if spec.name not in packed.packing.kept}
    replaced |= {spec.bias_tensor for spec in source.linears() if spec.name not in packed.packing.kept}
    replaced -= {"model.embed_tokens.weight"}  # looked up by row, so it stays even where it is also the head
    assert set(packed.kept_tensors()) == set(source.tensors) - replaced


def test_default_quantizer_and_report(llama, tmp_path):
    steps = []
    plan = small_plan(llama)
    report = pack(llama, tmp_path / "out", plan, progress=lambda *step: steps.append(step))
    source, packed = check_packed(llama, tmp_path / "out", plan, "hqq")
    assert packed.packing.quantizer == report.quantizer == "hqq"
    size = packed.size()
    assert report.packed == size.packed == resolve(plan, source.linears()).size()
    assert sum(module.bytes for module in report.modules) == size.packed.total_bytes
    assert (report.kept_bytes, report.bias_bytes, report.file_bytes) == (size.kept, size.bias, size.files)
    assert report.copied == ("generation_config.json", "tokenizer.json") and set(report.left) == {"custom.py"}
    specs = {spec.name: spec for spec in source.linears()}
    for module in report.modules:
        held, rows = dequantize(packed.weight(module.name)).double(), 0
        assert module.bpw == module.bytes * 8 / held.numel()
        for name in module.members:
            weight = source.read(specs[name].tensor).double()
            off = (weight - held[rows : rows + len(weight)]).norm() / weight.norm()
            # The report subtracts in fp32: one rounding of each difference, relative 2**-24, margin for the sum.
            assert module.errors[name] == pytest.approx(off.item(), rel=1e-6) and 0 < module.errors[name] < 1
            rows += len(weight)
    assert (report.modules[0].bits, report.modules[-1].bits) == (3.5, 6.0)  # q, k, v: 64 + 32 + 32 rows of 3, 4, 4 bits
    parsed = json.loads(json.dumps(report.to_dict()))
    assert parsed["packed"]["bpw"] == report.bpw and parsed["modules"][0]["name"].endswith("qkv_proj")
    done = [step[0] for step in steps]
    assert done == sorted(done) and done[-1] == steps[0][1] and {step[1] for step in steps} == {done[-1]}
    assert {name for _, _, name in steps} == {m for module in report.modules for m in module.members} | set(
        packed.kept_tensors()
    )


def test_files_and_alignment(llama, tmp_path):
    pack(llama, tmp_path / "out", mixed_plan(llama), quantizer="rtn", max_shard_bytes=30_000)
    packed = PackedCheckpoint.open(tmp_path / "out")
    count = len(packed.files.files)
    assert count > 3
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    companions = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    companions += ["mpq_manifest.json", "tokenizer.json"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(names + companions)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: t.file.name for name, t in sorted(packed.tensors.items())}
    assert index["metadata"]["total_size"] == sum(t.entry.nbytes for t in packed.tensors.values())
    for name, tensor in packed.tensors.items():
        assert tensor.entry.start % DTYPES[tensor.entry.dtype].itemsize == 0
        if name.endswith((".qweight", ".scales", ".zeros")):
            assert tensor.entry.start % ALIGNMENT == 0, name
    for module in packed.modules.values():  # one module is never spread over files
        assert len({packed.tensors[name].file for name in module.tensor_names}) == 1
    for file in packed.files.files:
        held = [t for t in packed.tensors.values() if t.file == file]
        owners = {t.name.rpartition(".")[0] for t in held}
        assert sum(t.entry.nbytes for t in held) <= 30_000 or len(owners) == 1


@pytest.mark.parametrize("head", [4, 16])
def test_tied_head_that_is_stored_as_head_only(head, tmp_path):
    """The embedding is written under its own name, which transformers needs; a packed head stands beside it."""
    tiny_model("llama", tmp_path / "model", tied=True)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    plan = Plan.uniform(tmp_path / "model", bits=4, group_size=-1, lm_head=head)
    pack(tmp_path / "model", tmp_path / "out", plan, quantizer="rtn")
    source, packed = check_packed(tmp_path / "model", tmp_path / "out", plan)
    check_kept(source, packed, {"model.embed_tokens.weight": "lm_head.weight"})
    assert "model.embed_tokens.weight" in packed.kept_tensors() and "lm_head.weight" not in packed.tensors
    assert ("lm_head.qweight" in packed.tensors) == (head == 4)


def test_tied_pair_that_is_stored_twice(tmp_path):
    tiny_model("llama", tmp_path / "model", tied=True)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    for name, bits, stored in (("kept", 16, True), ("packed", 4, False)):
        pack(
            tmp_path / "model", tmp_path / name, Plan.uniform(tmp_path / "model", 4, -1, lm_head=bits), quantizer="rtn"
        )
        packed = PackedCheckpoint.open(tmp_path / name)
        assert ("lm_head.weight" in packed.tensors) == stored and "model.embed_tokens.weight" in packed.tensors


def test_base_model_names(tmp_path):
    """Kept tensors keep the names of the source, packed ones have the model's; transformers maps the former."""
    tiny_model("llama", tmp_path / "model", tied=True)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    pack(tmp_path / "model", tmp_path / "out", UNIFORM, quantizer="rtn")
    source, packed = check_packed(tmp_path / "model", tmp_path / "out", UNIFORM)
    check_kept(source, packed)
    assert "layers.0.input_layernorm.weight" in packed.tensors
    assert "model.layers.0.mlp.up_proj.qweight" in packed.tensors


def test_config_gets_a_dtype_and_loses_code(tmp_path):
    """Without a dtype transformers would take that of the first floating tensor, which may be scales."""
    tiny_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["dtype"]
    config["auto_map"] = {"AutoConfig": "configuration.Config"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    pack(tmp_path / "model", tmp_path / "out", UNIFORM, quantizer="rtn")
    written = PackedCheckpoint.open(tmp_path / "out").config
    assert written["dtype"] == "bfloat16" and "auto_map" not in written


def test_one_weight_in_memory_at_a_time(llama, tmp_path, monkeypatch):
    """When a weight is quantized, the packed tensors of the one before have been written and released."""
    held = []
    real = job.pack_weight

    def watch(quantized):
        assert not any(ref() is not None for ref in held[:-3])
        packed = real(quantized)
        held.extend(weakref.ref(tensor) for tensor in packed.tensors().values())
        return packed

    monkeypatch.setattr(job, "pack_weight", watch)
    pack(llama, tmp_path / "out", UNIFORM, quantizer="rtn")
    assert len(held) == 3 * 15


def test_packed_model_is_not_packed_again(llama, tmp_path):
    pack(llama, tmp_path / "out", UNIFORM, quantizer="rtn")
    with pytest.raises(CheckpointError, match="already quantized with 'mpq'"):
        pack(tmp_path / "out", tmp_path / "again", UNIFORM)
