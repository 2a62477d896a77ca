"""Weights that the libraries of their formats made: what is imported is what those dequantize them to, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mpq_kernels.format.reference import dequantize
from mpq_kernels.format.words import pack_weight
from mpq_kernels.imports.formats import FORMATS, find_format
from mpq_kernels.imports.stored import Stored
from tests.made.gguf_file import write_gguf
from tests.made.golden import FOLDER, Golden, digest

FILES = {path.stem: Golden.read(path.stem) for path in sorted(FOLDER.glob("*.safetensors"))}
CASES = [(name, case) for name, golden in FILES.items() for case in golden.cases]


MODULES = {"gguf": "model.layers.0.mlp.up_proj"}  # what the one weight of a case is called, "m" elsewhere


def written(path, name, tensors, config, metadata):
    """A directory with these tensors, and what config.json says of them."""
    if name == "gguf":
        blocks = tensors["m.weight"]
        held = {"blk.0.ffn_up.weight": (config["type"], (len(blocks), config["cols"]), blocks.numpy().tobytes())}
        write_gguf(path / "model.gguf", "qwen2", held)
        (path / "config.json").write_text("{}")
        return Stored.open(path)
    save_file(tensors, path / "model.safetensors", metadata)
    (path / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    return Stored.open(path)


@pytest.mark.parametrize(("name", "case"), CASES, ids=[": ".join(pair) for pair in CASES])
def test_the_weight_is_that_of_its_library(name, case, tmp_path):
    row = FILES[name].cases[case]
    stored = written(tmp_path, name, FILES[name].tensors[case], row["config"], row.get("metadata"))
    found = FORMATS[find_format(stored)].read(stored)
    weight = found.weights[MODULES.get(name, "m")].read(stored.files)
    assert found.used == set(stored.tensors)
    dtype = getattr(torch, row["dtype"])
    assert digest(dequantize(weight, dtype)) == row["sha256"]
    assert digest(dequantize(pack_weight(weight), dtype)) == row["sha256"]


def test_every_format_has_a_golden_file():
    assert set(FORMATS) - {"mxfp4"} <= set(FILES)  # transformers itself is the oracle of that one
