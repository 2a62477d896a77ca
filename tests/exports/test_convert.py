"""Whole models: what is exported has the weights of the packed model, bit for bit, and imports as the same."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import mpq_kernels as mpq
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.errors import CheckpointError
from mpq_kernels.exports.integers import pack_words
from mpq_kernels.exports.targets import TARGETS
from mpq_kernels.files.shards import TensorFiles
from mpq_kernels.format.reference import dequantize
from mpq_kernels.imports.words import unpack
from mpq_kernels.plan.plan import Plan
from tests.made.checkpoints import tiny_model
from tests.made.foreign_checkpoints import (
    awq_checkpoint,
    compressed_checkpoint,
    gguf_checkpoint,
    gptq_checkpoint,
    mlx_checkpoint,
)


def weights(path):
    """Dense name -> fp32 weight of every packed linear of a directory."""
    held, out = PackedCheckpoint.open(path), {}
    for name, module in held.modules.items():
        dense, row = dequantize(held.weight(name)), 0
        rows = [layout.n1 - layout.n0 for layout in module.members or ()] or [len(dense)]
        for member, count in zip(module.replaced(), rows, strict=True):
            out[member], row = dense[row : row + count], row + count
    return out


def same(one, other):
    """Whether two directories have the same packed linears, bit for bit, and the same kept tensors."""
    first, second = weights(one), weights(other)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    kept = [PackedCheckpoint.open(path) for path in (one, other)]
    assert kept[0].kept_tensors() == kept[1].kept_tensors()
    assert all(torch.equal(kept[0].read(name), kept[1].read(name)) for name in kept[0].kept_tensors())


def mixed(name):
    return 8 if "down_proj" in name else 2 if "layers.1" in name else 3 if "v_proj" in name else 4


def by_input(name):
    return sum(name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_", "gate_").encode())


# case -> (maker, family, its words, the targets that can hold it)
CASES = {
    "gptq, mixed": (gptq_checkpoint, "llama", {"bits": mixed, "order": by_input}, ("gptq", "compressed-tensors")),
    "gptq, 4 bits": (gptq_checkpoint, "llama", {"symmetric": True}, ("gptq", "compressed-tensors", "awq", "mlx")),
    "ragged groups": (gptq_checkpoint, "llama", {"size": 128}, ("gptq", "compressed-tensors", "awq")),
    "awq with biases": (awq_checkpoint, "qwen2", {}, ("awq", "gptq", "compressed-tensors", "mlx")),
    "odd widths": (compressed_checkpoint, "llama", {"bits": lambda n: 5 if "v_" in n else 7}, ("compressed-tensors",)),
    "experts": (gptq_checkpoint, "mixtral", {"bits": lambda n: 8 if "experts.1" in n else 4}, ("gptq",)),
    "minima": (mlx_checkpoint, "qwen2", {"tied": True}, ("mlx",)),
    "gguf": (gguf_checkpoint, "llama", {}, ("mlx",)),
    "transposed": (gptq_checkpoint, "gpt2", {}, ("gptq",)),
}


@pytest.mark.parametrize("case", CASES)
def test_import_export_import(case, tmp_path):
    maker, family, words, targets = CASES[case]
    maker(tmp_path / "source", family, **words)
    mpq.import_checkpoint(tmp_path / "source", tmp_path / "packed", fuse=case == "gptq, 4 bits")
    for target in targets:
        report = mpq.export_checkpoint(tmp_path / "packed", tmp_path / target, to=target)
        assert set(report.linears) == set(weights(tmp_path / "packed"))
        mpq.import_checkpoint(tmp_path / target, tmp_path / f"again-{target}", format=target)
        same(tmp_path / "packed", tmp_path / f"again-{target}")
    listed = sorted(path.name for path in (tmp_path / targets[0]).iterdir())
    assert listed == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("zero", ["none", "int", "half", "min"])
def test_export_of_what_was_packed_here(zero, tmp_path):
    tiny_model("llama", tmp_path / "dense", sizes={"intermediate_size": 192})
    plan = Plan.uniform(tmp_path / "dense", bits=4, group_size=32, zero=zero)
    mpq.pack(tmp_path / "dense", tmp_path / "packed", plan, quantizer="rtn")
    for target in ("mlx",) if zero in ("half", "min") else ("gptq", "awq", "compressed-tensors", "mlx"):
        mpq.export_checkpoint(tmp_path / "packed", tmp_path / target, to=target, max_shard_bytes=100_000)
        assert (tmp_path / target / "model.safetensors.index.json").exists()
        mpq.import_checkpoint(tmp_path / target, tmp_path / f"again-{target}")
        same(tmp_path / "packed", tmp_path / f"again-{target}")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_bf16_is_what_dequantize_gives(family, tmp_path):
    gptq_checkpoint(tmp_path / "source", family, tied=family == "llama")
    mpq.import_checkpoint(tmp_path / "source", tmp_path / "packed")
    mpq.export_checkpoint(tmp_path / "packed", tmp_path / "dense", to="bf16")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    wanted = mpq.load(tmp_path / "packed").dequantize(torch.bfloat16)
    assert found.dtype == torch.bfloat16
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    files = TensorFiles.open_directory(tmp_path / "dense")
    assert all(tensor.dtype == torch.bfloat16 for tensor in files.tensors.values())


def test_compressed_tensors_unpacks_and_dequantizes_it(tmp_path):
    """Its own library: every weight of every width, with zero points and an order of the columns."""
    packer = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    gptq_checkpoint(tmp_path / "source", bits=mixed)
    mpq.import_checkpoint(tmp_path / "source", tmp_path / "packed")
    mpq.export_checkpoint(tmp_path / "packed", tmp_path / "out", to="compressed-tensors")
    files = TensorFiles.open_directory(tmp_path / "out")
    for name, wanted in weights(tmp_path / "packed").items():
        bits, shape = mixed(name), torch.Size(files.read(f"{name}.weight_shape").tolist())
        scale = files.read(f"{name}.weight_scale")
        codes = packer.unpack_from_int32(files.read(f"{name}.weight_packed"), bits, shape)
        held = files.read(f"{name}.weight_zero_point")
        zeros = packer.unpack_from_int32(held, bits, torch.Size(scale.shape), packed_dim=0)
        g_idx = torch.arange(shape[1]) // 32
        assert torch.equal((codes.float() - zeros.float()[:, g_idx]) * scale.float()[:, g_idx], wanted)


def test_config_groups_and_dynamic(tmp_path):
    gptq_checkpoint(tmp_path / "source", bits=mixed)
    mpq.import_checkpoint(tmp_path / "source", tmp_path / "packed")
    report = mpq.export_checkpoint(tmp_path / "packed", tmp_path / "ct", to="compressed-tensors")
    assert "--granularity fuse" in report.notes[0]
    said = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    groups = said["config_groups"].values()
    assert sorted(group["weights"]["num_bits"] for group in groups) == [2, 3, 4, 8]
    assert sum(len(group["targets"]) for group in groups) == 14 and said["ignore"] == ["lm_head"]
    mpq.export_checkpoint(tmp_path / "packed", tmp_path / "gptq", to="gptq")
    said = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert said["checkpoint_format"] == "gptq_v2" and "-:^lm_head$" in said["dynamic"]
    own = said["dynamic"][r"+:^model\.layers\.0\.self_attn\.v_proj$"]
    assert (own["bits"], own["group_size"], own["sym"]) == (3, 32, False)


REFUSED = {
    "width": ({"bits": 5}, "gptq", "q_proj has 5 bits, and gptq holds 2, 3, 4, 8"),
    "awq's one width": ({"bits": 3}, "awq", "has 3 bits, and awq holds 4"),
    "kind": ({"bits": 4, "zero": "float"}, "gptq", "zeros of the kind float at 4 bits.*plan with --zero int"),
    "scales": ({"bits": 4, "scale_dtype": "float32"}, "gptq", "scales in float32: plan with --scale-dtype float16"),
    "one bit": ({"bits": 1, "zero": "none"}, "compressed-tensors", "zeros of the kind none at 1 bits"),
    "mlx, zeros between codes": ({"bits": 4, "zero": "float"}, "mlx", "of the kind float with scales in float16"),
    "target": ({"bits": 4}, "gptqq", r"is not one of bf16, compressed-tensors, gptq, awq"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_come_before_any_work(case, tmp_path):
    words, target, text = REFUSED[case]
    tiny_model("llama", tmp_path / "dense", sizes={"intermediate_size": 192})
    plan = Plan.uniform(tmp_path / "dense", group_size=32, **words)
    mpq.pack(tmp_path / "dense", tmp_path / "packed", plan, quantizer="rtn")
    with pytest.raises(CheckpointError, match=text):
        mpq.export_checkpoint(tmp_path / "packed", tmp_path / "out", to=target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "packed"]


def test_nothing_is_left_of_a_run_that_fails(tmp_path, monkeypatch):
    gptq_checkpoint(tmp_path / "source")
    mpq.import_checkpoint(tmp_path / "source", tmp_path / "packed")
    before = sorted(tmp_path.iterdir())

    def stop(done, total, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mpq.export_checkpoint(tmp_path / "packed", tmp_path / "out", to="bf16", progress=stop)
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CheckpointError, match="is not empty; choose another"):
        mpq.export_checkpoint(tmp_path / "packed", tmp_path / "out", to="bf16")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [32, 40, 7])
def test_words_are_what_the_importer_reads(bits, count):
    codes = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8)
    assert torch.equal(unpack(pack_words(codes, bits).T.contiguous(), bits, count).T, codes)


def test_the_command_has_every_target():
    from mpq_kernels.cli.export import CHECKPOINTS

    assert tuple(TARGETS) == CHECKPOINTS


def test_compressed_tensors_loads_in_transformers(tmp_path):
    """Symmetric weights of several widths: its own library dequantizes them under transformers."""
    pytest.importorskip("compressed_tensors")
    gptq_checkpoint(tmp_path / "source", bits=mixed, symmetric=True)
    mpq.import_checkpoint(tmp_path / "source", tmp_path / "packed")
    mpq.export_checkpoint(tmp_path / "packed", tmp_path / "out", to="compressed-tensors")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(ids).logits
        wanted = mpq.load(tmp_path / "packed", dtype=torch.float32)(ids).logits
    assert (found - wanted).norm() < 2**-16 * wanted.norm()  # sums of fp32 in another order
