"""KL to the original by an independent calculation, truncated and stored."""

from pathlib import Path

import pytest
import torch

from mpq_kernels.errors import CheckpointError, MPQError
from mpq_kernels.evaluate.divergence import PERCENTILES, Predictions, divergence, predict
from tests.made.checkpoints import VOCAB, tiny_model

ROWS = 3 + torch.arange(6 * 24).view(6, 24)  # not the padding token, for which all logits are 0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model and one with other weights in one place."""
    path = tmp_path_factory.mktemp("models")
    first, other = (tiny_model("llama", path / name) for name in ("a", "b"))
    with torch.no_grad():
        weight = other.model.layers[1].mlp.down_proj.weight
        weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return first, other


def test_a_model_does_not_diverge_from_itself(models):
    found = divergence(models[0], predict(models[0], ROWS, VOCAB))
    assert found.kl < 1e-9 and found.top1 == 1 and found.ppl == pytest.approx(found.original_ppl, rel=1e-6)


@torch.no_grad()
def test_over_the_whole_vocabulary_it_is_the_divergence_of_the_softmaxes(models):
    first, other = models
    logits = [model(input_ids=ROWS).logits[:, :-1] for model in models]
    p, q = (each.double().log_softmax(-1) for each in logits)
    expected = (p.exp() * (p - q)).sum(-1)
    found = divergence(other, predict(first, ROWS, VOCAB, batch_size=4), batch_size=5)
    assert found.kl == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found.stderr == pytest.approx(float(expected.mean(1).std() / 6**0.5), rel=1e-4)
    assert found.top1 == float((logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean())
    assert found.percentiles["100"] == pytest.approx(float(expected.max()), rel=1e-4)
    assert found.percentiles["50"] == pytest.approx(float(expected.flatten().quantile(0.5)), rel=1e-3)
    assert list(found.percentiles) == [f"{p:g}" for p in PERCENTILES] and found.predicted == 6 * 23
    nll = -q.gather(-1, ROWS[:, 1:, None]).mean()
    assert found.ppl == pytest.approx(float(nll.exp()), rel=1e-5)


def test_what_is_left_out_is_one_more_outcome_and_can_only_lower_it(models):
    first, other = models
    # 1e-3: the probability of a tail is a difference of fp32 numbers near 1
    kls = [divergence(other, predict(first, ROWS, k)).kl for k in (1, 8, 64, VOCAB - 1, VOCAB)]
    assert all(0 < a <= b * (1 + 1e-3) for a, b in zip(kls, kls[1:], strict=False)) and kls[0] < kls[-1]
    assert kls[-2] == pytest.approx(kls[-1], rel=1e-3)  # the tail of one token is that token, but for rounding


def test_a_stored_reference_gives_the_same_figures(models, tmp_path):
    held = predict(models[0], ROWS, 32)
    held.to_file(tmp_path / "ref.safetensors")
    found = [divergence(models[1], each) for each in (held, Predictions.from_file(tmp_path / "ref.safetensors"))]
    assert found[0].kl == found[1].kl and found[0].percentiles == found[1].percentiles


def test_a_file_that_is_no_reference_is_refused(models, tmp_path):
    path = tmp_path / "ref.safetensors"
    path.write_bytes(b"not one")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Predictions.from_file(path)
    held = predict(models[0], ROWS, 4)
    Predictions(held.rows, held.ids[:3], held.logp[:3], held.nll).to_file(path)
    with pytest.raises(CheckpointError, match="do not fit the tokens"):
        Predictions.from_file(path)
    with pytest.raises(CheckpointError, match="not predictions"):
        Predictions.from_file(Path(__file__).parents[2] / "examples" / "gutenberg-6m" / "model.safetensors")


def test_bounds_are_checked(models, tmp_path):
    with pytest.raises(MPQError, match="top_k=0"):
        predict(models[0], ROWS, 0)
    small = tiny_model("llama", tmp_path / "small", sizes={"vocab_size": 64})
    with pytest.raises(MPQError, match="64 tokens"):
        divergence(small, predict(models[0], ROWS, VOCAB))
