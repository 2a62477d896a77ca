"""What cannot be had exactly, and what is no such checkpoint: refused in words, and nothing is written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mpq_kernels as mpq
from mpq_kernels.errors import CheckpointError
from tests.made.foreign_checkpoints import awq_checkpoint, compressed_checkpoint, gptq_checkpoint

NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture
def gptq(tmp_path):
    gptq_checkpoint(tmp_path / "source", size=32)
    return tmp_path / "source"


@pytest.fixture
def awq(tmp_path):
    awq_checkpoint(tmp_path / "source", size=32)
    return tmp_path / "source"


@pytest.fixture
def compressed(tmp_path):
    compressed_checkpoint(tmp_path / "source", size=32)
    return tmp_path / "source"


def change(path, leaf, value):
    """Another value of a tensor of one linear, None: none of it."""
    tensors = load_file(path / "model.safetensors")
    held = tensors.pop(f"{NAME}.{leaf}", None)
    new = value(held) if callable(value) else value
    save_file(tensors | ({} if new is None else {f"{NAME}.{leaf}": new.contiguous()}), path / "model.safetensors")


def say(path, **words):
    """Other words in the quantization_config."""
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= words
    (path / "config.json").write_text(json.dumps(config))


def refused(path, message, **words):
    with pytest.raises(CheckpointError, match=message):
        mpq.import_checkpoint(path, path.with_name("out"), **words)
    left = [each.name for each in path.parent.iterdir() if each.name.startswith((".out", "out"))]
    assert not left


def uneven(g_idx):
    """Groups of 31 and 33 columns."""
    return torch.where(torch.arange(len(g_idx)) == 32, 0, g_idx).to(torch.int32)


TENSORS = {
    "no zeros": ("qzeros", None, r"no file holds '.*up_proj\.qzeros', which .*up_proj needs"),
    "misshapen zeros": ("qzeros", lambda t: t[:, :3], "these are no words of gptq v2"),
    "float zeros": ("qzeros", lambda t: t.float(), "GPTQ's zeros are a matrix of int32"),
    "misshapen scales": ("scales", lambda t: t[:1], "these are no scales of"),
    "misshapen codes": ("qweight", lambda t: t[:-1], "these are no words of"),
    "integer scales": ("scales", lambda t: t.int(), "GPTQ's scales are a matrix of float16 or bfloat16 or float32"),
    "a group that is none": ("g_idx", lambda t: t + 1, "names a group that is not one of the 2"),
    "a negative group": ("g_idx", lambda t: t - 1, "names a group that is not one of the 2"),
    "groups of any size": ("g_idx", uneven, "groups of 31 to 33 of 64 columns share scales, and have no common"),
    "a matrix of groups": ("g_idx", lambda t: t[None], "the groups of the columns are one integer for each"),
    "also dense": ("weight", torch.ones(192, 64), "up_proj is also stored quantized; keep one"),
    "a bias that the model lacks": ("bias", torch.ones(192), "the model that config.json describes has no bias there"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_of_gptq(case, gptq):
    leaf, value, message = TENSORS[case]
    change(gptq, leaf, value)
    refused(gptq, message)


def test_a_damaged_scale_is_found_when_it_is_read(gptq):
    change(gptq, "scales", lambda t: t * torch.nan)
    with pytest.raises(CheckpointError, match=r"source/model\.safetensors: .*up_proj: scales hold NaN or Inf"):
        mpq.import_checkpoint(gptq, gptq.with_name("out"))


def test_biases_of_zeros_that_the_model_lacks_are_left_out(gptq):
    """AutoGPTQ writes them for every linear."""
    change(gptq, "bias", torch.zeros(192))
    report = mpq.import_checkpoint(gptq, gptq.with_name("out"))
    assert report.notes == ("1 biases are zeros, and the model has none there: they are left out",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"checkpoint_format": "marlin"},
            "is in the order of Marlin's kernel|order of Marlin's kernel; import the GPTQ",
        ),
        ({"checkpoint_format": "bitblas"}, "order of BitBLAS; import the GPTQ checkpoint"),
        ({"checkpoint_format": "qqq"}, "'qqq' is not one of gptq, gptq_v2, gptq_p"),
        ({"is_marlin_format": True}, "order of Marlin's kernel"),
        ({"quant_method": "qqq"}, "is none of gptq, .*quant_method='qqq'"),
        ({"quant_method": "auto-round", "data_type": "mx_fp"}, "only integers are imported"),
        ({"quant_method": "auto-round", "rotation_config": {"a": 1}}, "its weights expect rotated inputs"),
    ],
)
def test_words_of_gptq(words, message, gptq):
    say(gptq, **words)
    refused(gptq, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"version": "gemv_fast"}, "order of a kernel; import the gemm checkpoint"),
        ({"backend": "llm-awq"}, "order of a kernel; import the gemm checkpoint"),
        ({"version": "gemw"}, "'gemw' is not one of gemm, exllama, ipex, gemv"),
        ({"version": "gemv"}, "these are no words of AWQ's gemv layout"),
    ],
)
def test_words_of_awq(words, message, awq):
    say(awq, **words)
    refused(awq, message)


AWQ_TENSORS = {
    "no zeros": ("qzeros", None, r"no file holds '.*up_proj\.qzeros'"),
    "misshapen zeros": ("qzeros", lambda t: t[:1], "these are no words of AWQ's gemm layout"),
    "misshapen codes": ("qweight", lambda t: t[:, :3], "these are no words of AWQ's gemm layout"),
    "misshapen scales": ("scales", lambda t: t[:, :9], "these are no words of AWQ's gemm layout"),
}


@pytest.mark.parametrize("case", AWQ_TENSORS)
def test_tensors_of_awq(case, awq):
    leaf, value, message = AWQ_TENSORS[case]
    change(awq, leaf, value)
    refused(awq, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"format": "float-quantized"}, r"format='float-quantized': weights in fp8 are no integers"),
        ({"format": "nvfp4-pack-quantized"}, "weights in nvfp4 are no integers"),
        ({"format": "marlin-24"}, "Marlin's kernel for sparse weights"),
        ({"format": "another"}, r"format='another': is not known"),
        ({"config_groups": {"a": {"targets": ["Linear"], "format": "mxfp8-quantized"}}}, r"config_groups\.a\.format="),
        ({"config_groups": {"a": {"targets": "Linear"}}}, r"config_groups\.a: has no list of targets"),
        ({"config_groups": {"a": {"targets": ["re:("]}}}, r"target 're:\('"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 3}}}}, "are none of num_bits=3"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights are stored in a form of their own"),
        ({"transform_config": {"a": 1}}, "its weights expect transformed inputs"),
    ],
)
def test_words_of_compressed_tensors(words, message, compressed):
    say(compressed, **words)
    refused(compressed, message)


COMPRESSED_TENSORS = {
    "no scales": ("weight_scale", None, "no file holds '.*up_proj.weight_scale'"),
    "blocks of rows": ("weight_scale", lambda t: t[:3], "blocks of rows cannot be imported"),
    "integer scales": ("weight_scale", lambda t: t.int(), "scales are float16, bfloat16 or float32"),
    "no shape": ("weight_shape", None, "no file holds '.*up_proj.weight_shape'"),
    "another shape": ("weight_shape", torch.tensor([191, 64]), "has not the shape that .*weight_shape says"),
    "a long shape": ("weight_shape", torch.tensor([192, 64, 1]), "a shape is two integers"),
    "misshapen codes": ("weight_packed", lambda t: t[:, :-1], "7 words for 64 codes are none of num_bits=4"),
    "misshapen zeros": ("weight_zero_point", lambda t: t[1:], "these are no zero points of"),
    "float zeros": ("weight_zero_point", lambda t: t.float(), "these are no zero points of"),
    "a group that is none": ("weight_g_idx", torch.arange(64) // 16, "names a group that is not one of 2"),
    "few groups": ("weight_g_idx", torch.zeros(63).int(), "the groups of the columns are one integer for each"),
    "fp8 beside": ("weight", torch.ones(192, 64).to(torch.float8_e4m3fn), "weights of this dtype are no integers"),
}


@pytest.mark.parametrize("case", COMPRESSED_TENSORS)
def test_tensors_of_compressed_tensors(case, compressed):
    leaf, value, message = COMPRESSED_TENSORS[case]
    change(compressed, leaf, value)
    refused(compressed, message)


def test_formats(gptq):
    refused(gptq, "'gtpq' is not a known format; did you mean gptq", format="gtpq")
    say(gptq, checkpoint_format=None)
    refused(gptq, "these are no words of AWQ's gemm layout", format="awq")
    refused(gptq, "must be a positive number of bytes", max_shard_bytes=0)


def test_pickles(gptq):
    (gptq / "model.safetensors").rename(gptq / "model.bin")
    refused(gptq, "pickles can run code and are never read")


def test_the_config_is_an_object(gptq):
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps(config | {"quantization_config": [1]}))
    refused(gptq, r"quantization_config=\[1\] is not an object")


def test_experts_with_orders_of_their_own(tmp_path):
    gptq_checkpoint(tmp_path / "source", "mixtral", order=lambda name: sum(name.encode()))
    refused(tmp_path / "source", "were quantized with columns in other orders")


def test_experts_of_which_some_are_dense(tmp_path):
    twin = gptq_checkpoint(tmp_path / "source", "mixtral")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.1.w2"
    kept = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
    save_file(kept | {f"{name}.weight": twin[f"{name}.weight"]}, tmp_path / "source" / "model.safetensors")
    refused(tmp_path / "source", "1 of the 9 linears of model.layers.0.block_sparse_moe.experts are not quantized")
