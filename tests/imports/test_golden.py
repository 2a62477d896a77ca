"""Weights that the libraries of their formats made: what is imported is what those dequantize them to, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mpq_kernels.format.reference import dequantize
from mpq_kernels.format.words import pack_weight
from mpq_kernels.imports.formats import FORMATS, find_format
from mpq_kernels.imports.stored import Stored
from tests.made.golden import FOLDER, Golden, digest

FILES = {path.stem: Golden.read(path.stem) for path in sorted(FOLDER.glob("*.safetensors"))}
CASES = [(name, case) for name, golden in FILES.items() for case in golden.cases]


def written(path, tensors, config, metadata):
    """A directory with these tensors, and what config.json says of them."""
    save_file(tensors, path / "model.safetensors", metadata)
    (path / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    return Stored.open(path)


@pytest.mark.parametrize(("name", "case"), CASES, ids=[": ".join(pair) for pair in CASES])
def test_the_weight_is_that_of_its_library(name, case, tmp_path):
    row = FILES[name].cases[case]
    stored = written(tmp_path, FILES[name].tensors[case], row["config"], row.get("metadata"))
    found = FORMATS[find_format(stored)].read(stored)
    weight = found.weights["m"].read(stored.files)
    assert found.used == set(stored.tensors)
    dtype = getattr(torch, row["dtype"])
    assert digest(dequantize(weight, dtype)) == row["sha256"]
    assert digest(dequantize(pack_weight(weight), dtype)) == row["sha256"]


def test_every_format_has_a_golden_file():
    assert set(FORMATS) <= set(FILES)
