"""`MixedEmbedding`: a drop-in for the embeddings of dense/kinds.py, and what is tied to it."""

import copy
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
import transformers.models
from torch import nn

import mpq_kernels as mpq
from mpq_kernels.dense.kinds import SCALED_EMBEDDING, RowScale, is_embedding, row_scale
from mpq_kernels.errors import FormatError, PlanError, UnsupportedError
from mpq_kernels.format import reference
from mpq_kernels.format.words import pack_weight
from mpq_kernels.nn import MixedEmbedding
from mpq_kernels.nn.embedding import TiedEmbedding, TiedLinear
from tests.made.weights import X_DTYPES, mixed_weight, random_weight

IDS = torch.tensor([[0, 5, 199, 5], [70, 134, 198, 1]])


def dense_twin(packed, dtype, **options):
    """An nn.Embedding with the rows of a packed weight."""
    values = reference.dequantize(packed, dtype)
    twin = nn.Embedding(*values.shape, dtype=dtype, **options)
    twin.weight.data.copy_(values)
    return twin


@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_rows_are_those_of_the_dense_twin(dtype, permuted):
    packed = pack_weight(mixed_weight(permuted=permuted))
    layer = MixedEmbedding.from_rows(packed, padding_idx=5, dtype=dtype)
    rows = layer(IDS)
    assert rows.dtype == dtype and torch.equal(rows, dense_twin(packed, dtype, padding_idx=5)(IDS))
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (200, 320, 5)
    assert layer.weight.shape == (200, 320) and layer.weight.dtype == dtype and layer.backend == "cpu"


@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
@pytest.mark.parametrize("rounded", [False, True])
def test_the_factor_is_that_of_transformers(dtype, rounded):
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    made = Gemma3TextScaledWordEmbedding if rounded else BartScaledWordEmbedding
    packed = pack_weight(random_weight(200, 96, 5, 32))
    dense = made(200, 96, 3, embed_scale=96**0.5)
    dense.weight.data.copy_(reference.dequantize(packed))
    layer = MixedEmbedding.like(dense, packed.layout, dtype=torch.float32)
    layer.assign(packed)
    assert layer.scale == RowScale(96**0.5, rounded) and layer.padding_idx == 3
    assert torch.equal(layer.to(dtype)(IDS), dense.to(dtype)(IDS))


def test_every_scaled_embedding_of_transformers_is_one_of_two_forms():
    """The source of all classes of this name, since building each would import every model."""
    plain = "super().forward(input_ids) * self.embed_scale"
    forms = {plain, f"{plain}.to(self.weight.dtype)"}
    seen = 0
    for module in pkgutil.iter_modules(transformers.models.__path__):
        for path in (Path(transformers.models.__path__[0]) / module.name).glob("modeling_*.py"):
            text = path.read_text()
            for found in re.finditer(rf"class \w+{SCALED_EMBEDDING}\(nn\.Embedding\):\n(.*?)\n\n\n", text, re.DOTALL):
                if "nn.Parameter(" in found[1]:
                    continue  # a second parameter: is_embedding refuses it
                seen += 1
                returned = re.findall(r"return (.*)", found[1])
                assert len(returned) == 1 and returned[0] in forms, f"{path.name}: {returned}"
                assert ("scalar_embed_scale" in found[1]) == returned[0].endswith("dtype)"), path.name
    assert seen > 15


def test_what_is_an_embedding():
    positions = importlib.import_module("transformers.models.bart.modeling_bart").BartLearnedPositionalEmbedding(9, 4)
    assert is_embedding(nn.Embedding(4, 4)) and not is_embedding(positions)
    assert not is_embedding(nn.Embedding(4, 4, max_norm=1.0)) and not is_embedding(nn.EmbeddingBag(4, 4))
    assert row_scale(nn.Embedding(4, 4)) is None


def test_refusals():
    packed = pack_weight(random_weight(65, 64, 4, 64))
    layer = MixedEmbedding.from_rows(packed, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"index out of range: ids hold 65, and the embedding has rows 0\.\.64"):
        layer(torch.tensor([65]))
    with pytest.raises(FormatError, match="ids must be integers"):
        layer(torch.randn(2, 64))
    empty = MixedEmbedding(packed.layout, device="meta")
    assert empty(torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, 64)
    with pytest.raises(UnsupportedError, match="without values"):
        empty(torch.tensor([1]))
    with pytest.raises(UnsupportedError):
        MixedEmbedding.from_rows(packed, backend="triton")


def test_state_copies_and_dtypes():
    packed = pack_weight(random_weight(65, 64, 3, 64))
    layer = MixedEmbedding.from_rows(packed, scale=RowScale(3.3, True), dtype=torch.float32)
    assert set(layer.state_dict()) == {"qweight", "scales", "zeros"} and not list(layer.parameters())
    twin = copy.deepcopy(layer).to(torch.bfloat16)
    assert twin.scales.dtype == torch.float16 and twin(IDS[:1] // 4).dtype == torch.bfloat16
    other = MixedEmbedding(packed.layout, scale=RowScale(3.3, True), dtype=torch.float32)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(IDS // 4), layer(IDS // 4))


def test_compiles_and_exports():
    packed = pack_weight(random_weight(200, 64, 4, 64))
    layer = MixedEmbedding.from_rows(packed, scale=RowScale(8.1, True), dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IDS), layer(IDS))
    program = torch.export.export(layer, (IDS,), dynamic_shapes=({1: torch.export.Dim("n", min=2)},))
    assert torch.equal(program.module()(IDS[:, :3]), layer(IDS[:, :3]))


class Tied(nn.Module):
    """Two embeddings and a head of one weight, as encoder-decoder models have them."""

    def __init__(self, bias):
        super().__init__()
        self.shared = nn.Embedding(130, 64)
        self.decoder = nn.Embedding(130, 64, padding_idx=1)
        self.head = nn.Linear(64, 130, bias=bias)
        self.decoder.weight = self.head.weight = self.shared.weight
        self.body = nn.Linear(64, 64)

    def forward(self, ids):
        return self.head(self.body(self.shared(ids) + self.decoder(ids)))


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_tied_shares_one_packed_weight(bias):
    model = Tied(bias)
    dense, ids = copy.deepcopy(model), torch.arange(12)[None]
    plan = mpq.Plan.from_dict({"version": 1, "modules": {"shared": {"bits": 6}}})
    report = mpq.replace_linears(model, plan, "rtn")
    assert set(report.replaced) == {"shared", "decoder", "head"} and report.left == {"body": "no rule"}
    assert [type(m) for m in (model.shared, model.decoder, model.head)] == [MixedEmbedding, TiedEmbedding, TiedLinear]
    dense.shared.weight.data.copy_(model.shared.dequantize())
    assert set(model.state_dict()) == {"shared.qweight", "shared.scales", "shared.zeros"} | {
        name for name in dense.state_dict() if name.startswith("body") or name == "head.bias"
    }
    with torch.no_grad():
        torch.testing.assert_close(model(ids), dense(ids))
    assert torch.equal(model.head.dequantize(), model.shared.dequantize())


def test_offloading_what_is_tied():
    accelerate = pytest.importorskip("accelerate", reason="only a program that offloads needs it")
    model, ids = Tied(True), torch.arange(9)[None]
    mpq.replace_linears(model, mpq.Plan.from_dict({"version": 1, "modules": {"shared": {"bits": 5}}}), "rtn")
    with torch.no_grad():
        wanted = model(ids)
        moved = accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
        assert moved.head.bias.is_meta and torch.equal(moved(ids), wanted)


def test_gradients_go_through_a_tied_head():
    model = Tied(False)
    mpq.replace_linears(model, mpq.Plan.from_dict({"version": 1, "modules": {"shared": {"bits": 8}}}), "rtn")
    model(torch.arange(5)[None]).sum().backward()
    wanted = model.head.dequantize().sum(0)
    rows = model.shared(torch.arange(5)) * 2
    torch.testing.assert_close(model.body.weight.grad, wanted[:, None] * rows.sum(0)[None])


def test_the_plan_may_give_the_head_a_width_of_its_own():
    model = Tied(False)
    rules = {"shared": {"bits": 4}, "head": {"bits": 8}}
    mpq.replace_linears(model, mpq.Plan.from_dict({"version": 1, "modules": rules}), "rtn")
    assert isinstance(model.head, mpq.MixedLinear) and model.head.layout.segments[0].bits == 8
    with pytest.raises(PlanError, match="head is kept .* leave head out of the plan"):
        mpq.replace_linears(Tied(False), mpq.Plan.from_dict({"version": 1, "modules": rules | {"head": {"bits": 16}}}))
