"""The golden vectors: a program of its own writes them again, and the package packs and reads every one."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from mpq_kernels.format import reference
from mpq_kernels.format.codes import FORMATS, SCALE_DTYPES
from mpq_kernels.format.kinds import ZERO_KINDS
from mpq_kernels.format.layout import WeightLayout
from mpq_kernels.format.lookup import lookup
from mpq_kernels.format.weights import TORCH_DTYPES, QuantizedBlock, QuantizedWeight
from mpq_kernels.format.words import PACKERS, pack_weight, unpack_weight
from tests.made import format_vectors

FILE = Path(__file__).parents[2] / "docs" / "format_vectors.json"
VECTORS = json.loads(FILE.read_text())["vectors"]


def quantized(vector) -> QuantizedWeight:
    """The weight that the file's comment describes."""
    layout = WeightLayout.from_dict(vector["layout"])
    stream = format_vectors.Stream(vector["seed"])
    blocks = []
    for s in layout.segments:

        def reals(s=s):
            values = [stream.real(layout.scale_dtype) for _ in range(s.rows * s.groups)]
            return torch.tensor(values).view(s.rows, s.groups).to(TORCH_DTYPES[layout.scale_dtype])

        codes = torch.tensor([stream.next() >> (32 - s.bits) for _ in range(s.rows * s.cols)], dtype=torch.uint8)
        scales, zeros = reals(), None
        if s.zero == "int":
            bytes_ = [stream.next() >> 24 for _ in range(s.rows * s.groups)]
            zeros = torch.tensor(bytes_, dtype=torch.uint8).view(s.rows, s.groups)
        elif s.zero in ("float", "min"):
            zeros = reals()
        blocks.append((s.n0, s.k0, QuantizedBlock(s.bits, codes.view(s.rows, s.cols), scales, zeros, s.zero)))
    k = layout.in_features
    perm = torch.tensor([(7 * j + 3) % k for j in range(k)], dtype=torch.int32) if layout.permuted else None
    return QuantizedWeight(tuple(blocks), perm)


def summary(tensor) -> dict:
    return format_vectors.summary(tensor.contiguous().view(torch.uint8).numpy().tobytes(), tensor.element_size())


def test_the_program_writes_the_file():
    assert format_vectors.text() == FILE.read_text()


def test_they_cover_widths_kinds_and_dtypes():
    layouts = [WeightLayout.from_dict(v["layout"]) for v in VECTORS]
    found = {(s.bits, s.zero, layout.scale_dtype) for layout in layouts for s in layout.segments}
    assert found >= {(b, z, d) for b in FORMATS for z in ZERO_KINDS for d in SCALE_DTYPES}
    assert {len(layout.segments) > 1 for layout in layouts} == {layout.permuted for layout in layouts} == {True, False}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: str(v["seed"]))
def test_golden_vector(vector):
    weight = quantized(vector)
    for method in PACKERS:
        packed = pack_weight(weight, method)
        assert packed.layout.to_dict() == vector["layout"]
        assert summary(packed.qweight) == vector["qweight"] and summary(packed.scales) == vector["scales"]
        assert (packed.zeros is None) == (vector["zeros"] is None)
        assert packed.zeros is None or summary(packed.zeros) == vector["zeros"]
        dense = reference.dequantize(unpack_weight(packed, method))
        assert hashlib.sha256(dense.numpy().tobytes()).hexdigest() == vector["dense"]["sha256"]
    assert torch.equal(lookup(packed, torch.arange(len(dense))), dense)
