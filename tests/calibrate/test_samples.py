"""Calibration on what a processor makes of images and sound: towers and language parts see what they will be given."""

import pytest
import torch

import mpq_kernels as mpq
from mpq_kernels.calibrate.calibration import Calibration
from mpq_kernels.calibrate.hessians import Calibrator
from mpq_kernels.calibrate.load import StoredModel
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.errors import QuantizeError
from mpq_kernels.plan.plan import Plan
from tests.made.multimodal import FAMILIES, inputs, tiny_multimodal

SEEDS = range(1, 4)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(family, its dense directory, three samples)."""
    source = tiny_multimodal(request.param, tmp_path_factory.mktemp(request.param) / "dense")
    return request.param, source, [inputs(request.param, seed) for seed in SEEDS]


def test_hessians_are_those_of_the_whole_model(family):
    """Of every linear but experts, with the walk block by block against hooks in one model."""
    name, source, samples = family
    model = FAMILIES[name][1].from_pretrained(source).eval()
    specs = [spec for spec in DenseCheckpoint.open(source).linears() if spec.expert is None]
    seen = {spec.name: [] for spec in specs}
    for spec in specs:
        keep = seen[spec.name].append
        model.get_submodule(spec.name).register_forward_pre_hook(
            lambda _, args, keep=keep: keep(args[0].flatten(0, -2))
        )
    with torch.no_grad():
        for sample in samples:
            model(**sample)
    calibrator = Calibrator(DenseCheckpoint.open(source), Calibration(samples=samples, damping=0.0))
    order = sorted((spec.name for spec in specs), key=calibrator.walk.stage)
    for linear in order:
        x = torch.cat(seen[linear]).double()
        wanted = x.T @ x / len(x)
        assert (calibrator.hessian(linear) - wanted).norm() <= 1e-5 * wanted.norm(), linear  # fp32 sums
    assert any(spec.tower for spec in specs)


def test_gptq_packs_towers_on_samples(tmp_path):
    name, source = "qwen3_vl", tiny_multimodal("qwen3_vl", tmp_path / "dense")
    samples = [inputs(name, seed) for seed in SEEDS]
    plan = Plan.uniform(source, bits=3, group_size=-1, towers=3)
    mpq.pack(source, tmp_path / "gptq", plan, quantizer="gptq", calibration=Calibration(samples=samples))
    mpq.pack(source, tmp_path / "rtn", plan, quantizer="rtn")
    model = FAMILIES[name][1].from_pretrained(source).eval()

    def loss(path):
        packed = mpq.load(path)
        with torch.no_grad():
            return sum(float((packed(**each).logits - model(**each).logits).norm()) for each in samples)

    assert loss(tmp_path / "gptq") < loss(tmp_path / "rtn")


def test_the_model_runs_on_a_text_too(tmp_path):
    """Then no token reaches the tower, whose linears must be kept."""
    source = tiny_multimodal("qwen3_vl", tmp_path / "dense")
    tokens = torch.randint(3, 100, (4, 16), generator=torch.Generator().manual_seed(0))
    plan = Plan.uniform(source, bits=4, group_size=-1)
    mpq.pack(source, tmp_path / "out", plan, quantizer="gptq", calibration=Calibration(tokens=tokens))
    with pytest.raises(QuantizeError, match=r"model\.visual\..*no token .* reaches this linear"):
        plan = Plan.uniform(source, bits=4, group_size=-1, towers=4)
        mpq.pack(source, tmp_path / "out2", plan, quantizer="gptq", calibration=Calibration(tokens=tokens))
    assert not (tmp_path / "out2").exists()


def test_only_the_first_samples_are_read(family):
    name, source, samples = family
    config = StoredModel(DenseCheckpoint.open(source), torch.device("cpu")).model.config
    count = sum(value.numel() for key, value in samples[0].items() if key.endswith("input_ids"))
    for limit, read in ((None, 3), (3 * count, 3), (3 * count - 1, 2), (1, 1)):
        found = Calibration(samples=samples, max_tokens=limit).inputs(source, config)
        assert [each.keys() for each in found] == [each.keys() for each in samples[:read]]


def test_identity_depends_on_every_tensor():
    first = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "pixel_values": torch.ones(1, 2, dtype=torch.bfloat16)}
    found = {Calibration(samples=[first]).identity()["sha256"], Calibration(samples=[first] * 2).identity()["sha256"]}
    for name, tensor in first.items():
        found.add(Calibration(samples=[first | {name: tensor + 1}]).identity()["sha256"])
        found.add(Calibration(samples=[first | {name: tensor.flatten()}]).identity()["sha256"])
    assert len(found) == 6
    assert Calibration(samples=[dict(first)]).identity()["sha256"] in found


IDS = torch.ones(1, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"samples": []}, "at least one"),
        ({"samples": [{"pixel_values": torch.ones(1)}]}, "input_ids or decoder_input_ids"),
        ({"samples": [{"input_ids": IDS}, {"input_ids": IDS, "pixel_values": IDS}]}, "all of the same names"),
        ({"samples": [{"input_ids": [[1, 2]]}]}, "input_ids is none"),
        ({"samples": [{"input_ids": IDS}], "tokens": IDS}, "exactly one"),
        ({"samples": [{"input_ids": IDS}], "token_weights": lambda *given: given[1]}, "token_weights"),
    ],
)
def test_samples_that_are_none(words, reason):
    with pytest.raises(QuantizeError, match=reason):
        Calibration(**words)


def test_a_quantizer_that_reads_texts_alone_refuses_samples(tmp_path):
    with pytest.raises(QuantizeError, match="reads a text or tokens"):
        Calibration(samples=[{"input_ids": IDS}]).rows(tmp_path, None)
