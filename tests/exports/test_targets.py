"""Single weights of every target, width and kind of zeros: what is written is read by the importer, bit for bit."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from mpq_kernels.errors import CheckpointError
from mpq_kernels.exports.source import Linear, PackedSource
from mpq_kernels.exports.targets import TARGETS
from mpq_kernels.format.layout import Segment, WeightLayout
from mpq_kernels.format.random import random_weight
from mpq_kernels.format.reference import dequantize
from mpq_kernels.imports.formats import FORMATS
from mpq_kernels.imports.stored import Stored

WIDTHS = {"compressed-tensors": range(1, 9), "gptq": (2, 3, 4, 8), "awq": (4,), "mlx": (2, 3, 4, 5, 6, 8)}
KINDS = {"mlx": ("none", "half", "int", "min")}
CASES = [
    (target, bits, zero)
    for target, widths in WIDTHS.items()
    for bits in widths
    for zero in KINDS.get(target, ("none", "int"))
    if (bits, zero) != (1, "none")
]


class OneWeight(PackedSource):
    """A source of one weight, which no directory holds."""

    def __init__(self, weight):
        layout = weight.layout
        linear = Linear("m", "m", 0, layout.out_features, layout.in_features, layout, False, False, False)
        packing = SimpleNamespace(kept={}, floats={})
        object.__setattr__(self, "checkpoint", SimpleNamespace(path="here", packing=packing))
        self.__dict__["linears"], self.__dict__["held"] = [linear], weight

    def weight(self, linear):
        return self.held


def made(segments, dtype="float16", permuted=False):
    rows, cols = max(s.n1 for s in segments), max(s.k1 for s in segments)
    layout = WeightLayout(rows, cols, tuple(segments), dtype, permuted)
    return random_weight(layout, "cpu", torch.Generator().manual_seed(1))


def again(path, target, weight):
    """The weight that the importer reads of what is written."""
    source = OneWeight(weight)
    form = TARGETS[target](source)
    tensors = form.make(source.linears[0])
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == form.specs["m"]
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(form.config))
    stored = Stored.open(path)
    assert FORMATS[target].recognises(stored)
    return FORMATS[target].read(stored).weights["m"].read(stored.files)


@pytest.mark.parametrize(("target", "bits", "zero"), CASES, ids=lambda value: str(value))
def test_every_width_and_kind(target, bits, zero, tmp_path):
    weight = made([Segment(0, 96, 0, 256, bits, 64, zero)])
    assert torch.equal(dequantize(again(tmp_path, target, weight)), dequantize(weight))


@pytest.mark.parametrize("target", WIDTHS)
def test_groups_of_two_sizes_and_bands_of_two_kinds(target, tmp_path):
    cut = [
        Segment(n, n + 64, k, k + 128, 4, g, z) for n, z in ((0, "none"), (64, "int")) for k, g in ((0, 32), (128, 64))
    ]
    assert torch.equal(dequantize(again(tmp_path, target, made(cut))), dequantize(made(cut)))


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors"])
def test_an_order_of_the_columns(target, tmp_path):
    weight = made([Segment(0, 64, 0, 256, 3, 32, "int")], permuted=True)
    assert not torch.equal(weight.perm, torch.arange(256, dtype=torch.int32))
    assert torch.equal(dequantize(again(tmp_path, target, weight)), dequantize(weight))


REFUSED = {
    "two widths": (
        "gptq",
        [Segment(0, 64, 0, 64, 4, 64, "int"), Segment(0, 64, 64, 128, 3, 64, "int")],
        {},
        "3 and 4 bits.*linear",
    ),
    "width": ("mlx", [Segment(0, 64, 0, 64, 7, 64, "min")], {}, "7 bits, and mlx holds 2, 3, 4, 5, 6, 8"),
    "order": ("awq", [Segment(0, 64, 0, 128, 4, 64, "int")], {"permuted": True}, "reordered columns"),
    "kind": ("awq", [Segment(0, 64, 0, 128, 4, 64, "half")], {}, "kind half at 4 bits.*--zero int"),
    "float": ("mlx", [Segment(0, 64, 0, 128, 4, 64, "float")], {}, "kind float with scales in float16.*--zero min"),
    "rows": ("gptq", [Segment(0, 40, 0, 64, 4, 64, "int")], {}, "40 x 64, and gptq fills whole words"),
    "scales": ("awq", [Segment(0, 64, 0, 64, 4, 64, "int")], {"dtype": "float32"}, "scales in float32: plan with"),
    "group": ("mlx", [Segment(0, 64, 0, 64, 4, 16, "min")], {}, "groups of 16, and mlx holds 32, 64, 128"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    target, segments, words, text = REFUSED[case]
    with pytest.raises(CheckpointError, match=f"cannot be written as {target}: m .*{text}"):
        TARGETS[target](OneWeight(made(segments, **words)))


def test_a_zero_point_beyond_the_codes_is_refused():
    weight = made([Segment(0, 64, 0, 64, 4, 64, "int")])
    weight.zeros[0] = 16
    with pytest.raises(CheckpointError, match="zero point of 16, which is no code of 4 bits"):
        TARGETS["gptq"](OneWeight(weight))
