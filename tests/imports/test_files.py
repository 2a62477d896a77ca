"""Hostile and odd files of HQQ, torchao, quanto, MLX and GGUF: refused in words, before anything is written."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mpq_kernels.errors import CheckpointError
from mpq_kernels.imports.formats import FORMATS, REFUSED, find_format
from mpq_kernels.imports.gguf_file import read_gguf_header
from mpq_kernels.imports.stored import Stored
from tests.made.gguf_file import dense, gguf_bytes
from tests.made.golden import Golden


def read(path, name, case, change=None, metadata=None, config=None):
    """What the reader makes of a golden case after `change` of its tensors, and of further words of its config."""
    golden = Golden.read(name)
    tensors = dict(golden.tensors[case])
    if change is not None:
        change(tensors)
    held = golden.cases[case].get("metadata") if metadata is None else metadata
    save_file(tensors, path / "model.safetensors", held)
    said = golden.cases[case]["config"] | (config or {})
    (path / "config.json").write_text(json.dumps({"quantization_config": said} if said else {}))
    stored = Stored.open(path)
    return FORMATS[name].read(stored), stored


def put(name, value):
    """A change of one tensor; None: none of it."""

    def change(tensors):
        old = tensors.pop(f"m.{name}")
        new = value(old) if callable(value) else value
        if new is not None:
            tensors[f"m.{name}"] = new.contiguous()

    return change


HQQ = {
    "axis 0": (put("axis", torch.tensor(0)), "axis=0: its groups are columns of several rows"),
    "quantized scales": (put("quant_scale", torch.tensor(1)), "scales and zeros that are quantized themselves"),
    "a packing": (put("packing", torch.tensor([52, 98], dtype=torch.uint8)), "packing='4b' is not one of 8bit_u8"),
    "a long text": (put("packing", torch.zeros(65, dtype=torch.uint8)), "is not 1 to 64 integers"),
    "a float axis": (put("axis", torch.tensor(1.0)), "is not 1 to 1 integers"),
    "groups across rows": (put("group_size", torch.tensor(48)), "a group must be a part of one row"),
    "another shape": (put("shape", torch.tensor([32, 32])), "these are no scales and zeros of 32 groups"),
    "no shape": (put("shape", None), "no file holds 'm.shape'"),
    "fewer codes": (put("W_q", lambda t: t[1:]), "is not 32 x 64 codes, 4bit_u8"),
    "integer zeros": (put("zero", lambda t: t.int()), "these are no scales and zeros"),
}


@pytest.mark.parametrize("case", HQQ)
def test_hqq(case, tmp_path):
    change, message = HQQ[case]
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, "hqq", "4 bits", change)


TORCHAO = {
    "no metadata": ({}, None, "its metadata says nothing of m.weight"),
    "another class": ({"m.weight": '{"_type": "Int4Tensor"}'}, None, "m is a 'Int4Tensor' of torchao, and only"),
    "no object": ({"m.weight": "[1]"}, None, r"\[1\] is not an object"),
    "no width": ({"m.weight": '{"_type": "IntxUnpackedToInt8Tensor"}'}, None, "target_dtype=None is no int1 to int8"),
    "misshapen scales": (None, put("_weight_scale", lambda t: t[:5]), "these are no scales of"),
    "misshapen zeros": (None, put("_weight_zero_point", lambda t: t[:, :1]), "these are no zero points of"),
}


@pytest.mark.parametrize("case", TORCHAO)
def test_torchao(case, tmp_path):
    metadata, change, message = TORCHAO[case]
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, "torchao", "int4 asymmetric", change, metadata)


def test_a_code_that_is_too_wide_is_found_when_it_is_read(tmp_path):
    found, stored = read(tmp_path, "torchao", "int4 asymmetric", put("_weight_qdata", lambda t: t + 8))
    with pytest.raises(CheckpointError, match="does not fit 4 bits"):
        found.weights["m"].read(stored.files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("weight._data", lambda t: t.to(torch.float8_e4m3fn)), "floats of 8 bits are no integers"),
        (put("weight._scale", lambda t: t.T), "these are no scales of"),
    ],
)
def test_quanto(change, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, "quanto", "qint8 float16", change)


def test_packed_codes_of_quanto(tmp_path):
    save_file({"m.weight._data._data": torch.zeros(4, 4, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="packed codes of 2 or 4 bits"):
        FORMATS["quanto"].read(Stored.open(tmp_path))


MLX = {
    "a mode": ({"mode": "mxfp4"}, None, "mode='mxfp4': only affine codes are imported"),
    "a mode of one module": ({"m": {"mode": "nvfp4"}}, None, "mode='nvfp4'"),
    "a width": ({"bits": 7}, None, "bits=7, group_size=64 are none of MLX's"),
    "another width": ({"bits": 8}, None, "these are no words of 8 bits in groups of 64"),
    "experts": (None, put("weight", lambda t: t[None]), "experts that are stored in one tensor"),
    "no biases": (None, put("biases", None), "no file holds 'm.biases'"),
    "other biases": (None, put("biases", lambda t: t.float()), "these are no words of"),
}


@pytest.mark.parametrize("case", MLX)
def test_mlx(case, tmp_path):
    config, change, message = MLX[case]
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, "mlx", "4 bits", change, config=config)


@pytest.mark.parametrize("name", REFUSED)
def test_known_formats_that_are_not_imported(name, tmp_path):
    save_file({"m.qweight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": name}}))
    with pytest.raises(CheckpointError, match=f"quant_method='{name}': "):
        find_format(Stored.open(tmp_path))


VALUES = dense(np.ones(64, np.float32))
NORM = {"output_norm.weight": VALUES}


def blocks(kind, shape, size):
    return {"blk.0.ffn_up.weight": (kind, shape, bytes(size))}


GGUF = {
    "another magic": (b"GGML" + bytes(40), "does not begin as GGUF"),
    "another version": (b"GGUF" + struct.pack("<I", 9) + bytes(40), "does not begin as GGUF of versions"),
    "empty": (b"", "ends inside its header"),
    "too many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 1), "1099511627776 tensors"),
    "a long text": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60), "a text of 1152921504606846976 bytes"),
    "a list of lists": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9,
        "a value of type 9",
    ),
    "a type of values": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 77),
        "a value of type 77",
    ),
    "an architecture": (gguf_bytes("gemma3", NORM), "architecture is 'gemma3', and names and orders are known of"),
    "an alignment": (gguf_bytes("llama", NORM, {"general.alignment": 33}), "an alignment of 33"),
    "a table type": (gguf_bytes("llama", blocks(23, (2, 256), 272)), "is IQ4_XS: its codes are entries of a table"),
    "no type": (gguf_bytes("llama", blocks(99, (2, 256), 272)), "of type 99"),
    "half a block": (gguf_bytes("llama", blocks(12, (2, 128), 144)), r"\[128, 2\] are no blocks of Q4_K"),
    "a huge shape": (gguf_bytes("llama", blocks(0, (2**40, 2**40), 8)), "are no blocks of F32"),
    "cut off": (gguf_bytes("llama", blocks(8, (2, 64), 136))[:-40], "ends at byte"),
    "a name": (
        gguf_bytes("llama", {"blk.0.attn_sinks.weight": NORM["output_norm.weight"]}),
        "is not known of a model of",
    ),
    "a bad name": (gguf_bytes("llama", {"../x": VALUES}), "is not known of a model of llama"),
    "too many dimensions": (gguf_bytes("llama", {"output.weight": (0, (1, 1, 1, 1, 1), bytes(4))}), "of 5 dimensions"),
    "experts of two dimensions": (
        gguf_bytes("llama", {"blk.0.ffn_up_exps.weight": (8, (2, 32), bytes(68))}),
        "is not known",
    ),
}


@pytest.mark.parametrize("case", GGUF)
def test_gguf(case, tmp_path):
    data, message = GGUF[case]
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_gguf_header(tmp_path / "model.gguf")


def test_experts_of_gguf_are_pieces_of_one_tensor(tmp_path):
    held = bytes(range(64)) + bytes(72)
    held = {"blk.0.ffn_up_exps.weight": (8, (2, 2, 32), held)}  # two experts of two rows of one block
    (tmp_path / "model.gguf").write_bytes(gguf_bytes("qwen3moe", held))
    (tmp_path / "config.json").write_text("{}")
    files = Stored.open(tmp_path).files
    first, second = (files.read(f"model.layers.0.mlp.experts.{index}.up_proj.weight") for index in range(2))
    assert first.shape == second.shape == (2, 34) and first[1, 0] == 34 and second[0, 0] == 0


def test_heads_of_gguf_must_share_out_the_rows(tmp_path):
    held = {"blk.0.attn_q.weight": (8, (6, 32), bytes(6 * 34))}
    (tmp_path / "model.gguf").write_bytes(gguf_bytes("llama", held))
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    with pytest.raises(CheckpointError, match="num_attention_heads=4 in config.json does not share out its 6 rows"):
        FORMATS["gguf"].read(Stored.open(tmp_path))
