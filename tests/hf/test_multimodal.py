"""Models that read images or sound: towers and projectors kept or packed, and the logits of the dequantized model."""

import pytest
import torch

import mpq_kernels as mpq
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.nn.linear import packed_modules
from tests.made.multimodal import FAMILIES, inputs, tiny_multimodal
from tests.made.twins import dequantized_twin


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(family, its dense directory)."""
    return request.param, tiny_multimodal(request.param, tmp_path_factory.mktemp(request.param) / "dense")


@pytest.mark.parametrize("towers", [16, 5])
def test_logits_are_those_of_the_dequantized_model(family, towers, tmp_path):
    name, source = family
    linears = DenseCheckpoint.open(source).linears()
    plan = mpq.Plan.uniform(source, bits=4, group_size=32, lm_head=8, towers=towers)
    mpq.pack(source, tmp_path / "packed", plan, quantizer="rtn")
    model = mpq.load(tmp_path / "packed")
    assert type(model) is FAMILIES[name][1]
    packed = {each for each, _ in packed_modules(model)}
    wanted = [spec for spec in linears if towers < 16 or not spec.tower]
    assert packed == {spec.name for spec in wanted if spec.expert is None} | {
        f"{spec.expert.block}.{leaf}" for spec in wanted if spec.expert for leaf in ("gate_up", "down")
    }
    twin = dequantized_twin(model, source, type(model))
    with torch.no_grad():
        wanted, found = twin(**inputs(name)).logits, model(**inputs(name)).logits
        other = model(**inputs(name, seed=2)).logits
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()  # fp32 sums in another order
    assert not torch.equal(found[:, -1], other[:, -1])  # another image, or sound, is another answer
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(mpq.load(tmp_path / "again")(**inputs(name)).logits, found)


def test_generation_takes_images_and_sound(family, tmp_path):
    name, source = family
    mpq.pack(source, tmp_path / "packed", mpq.Plan.uniform(source, bits=5, group_size=32), quantizer="rtn")
    model = mpq.load(tmp_path / "packed")
    words = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**inputs(name), **words)
    assert torch.equal(found, dequantized_twin(model, source, type(model)).generate(**inputs(name), **words))
