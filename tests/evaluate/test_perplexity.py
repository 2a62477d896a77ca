"""Perplexity by an independent calculation, the published figure of the shipped model, and timing that counts right."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpq_kernels.errors import MPQError
from mpq_kernels.evaluate.perplexity import perplexity
from mpq_kernels.evaluate.speed import generation_speed

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = (EXAMPLES / "gutenberg_val.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EXAMPLES / "gutenberg-6m", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLES / "gutenberg-6m")


class Uniform:
    """A model that knows nothing: equal logits for every token of its vocabulary."""

    device = torch.device("cpu")

    def __init__(self, vocab, dtype=torch.bfloat16):
        self.vocab, self.dtype, self.batches = vocab, dtype, []
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocab))

    def __call__(self, input_ids, **kwargs):
        self.batches.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocab, dtype=self.dtype))


class Filled(Uniform):
    """Every logit is the same broken number."""

    def __init__(self, fill):
        super().__init__(64)
        self.fill = fill

    def __call__(self, input_ids, **kwargs):
        return SimpleNamespace(logits=torch.full((*input_ids.shape, 64), self.fill))


def characters(text, add_special_tokens, **kwargs):
    """A tokenizer with one token for each character, and a start token when it may add one."""
    return {"input_ids": [0] * add_special_tokens + [ord(c) % 64 for c in text]}


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    result = perplexity(Uniform(64), characters, "x" * 100, window=8)
    assert result.ppl == pytest.approx(64, rel=1e-6)
    assert result.nll == pytest.approx(math.log(64), rel=1e-6)
    assert (result.tokens, result.predicted, result.window) == (96, 12 * 7, 8)


@pytest.mark.parametrize(
    ("max_tokens", "batch_size", "batches"),
    [(None, 8, [(8, 8), (4, 8)]), (63, 5, [(5, 8), (2, 8)]), (8, 1, [(1, 8)]), (1000, 100, [(12, 8)])],
)
def test_windows_and_batches(max_tokens, batch_size, batches):
    model, seen = Uniform(64), []
    perplexity(
        model,
        characters,
        "x" * 100,
        window=8,
        max_tokens=max_tokens,
        batch_size=batch_size,
        progress=lambda done, total, what: seen.append((done, total, what)),
    )
    assert model.batches == batches
    ends = [sum(rows for rows, _ in batches[: i + 1]) for i in range(len(batches))]
    assert seen == [(end, ends[-1], "windows") for end in ends]


def test_a_large_vocabulary_makes_the_batches_smaller():
    model = Uniform(1 << 20)
    result = perplexity(model, characters, "x" * 48, window=16, batch_size=8)
    assert model.batches == [(3, 16)]  # 16 * 2**20 logits a window: four of them reach 2**26
    assert result.ppl == pytest.approx(1 << 20, rel=1e-5)


def test_against_a_plain_calculation(model, tokenizer):
    """One window at a time, log-softmax by hand in fp64."""
    ids = tokenizer(TEXT[:20000], add_special_tokens=False)["input_ids"][:1000]
    total, count = 0.0, 0
    for start in (0, 256, 512):  # the fourth window is incomplete
        window = torch.tensor([ids[start : start + 256]])
        with torch.no_grad():
            logits = model(window).logits[0].double()
        log_p = logits - logits.exp().sum(-1, keepdim=True).log()
        for position in range(255):
            total -= log_p[position, window[0, position + 1]].item()
            count += 1
    result = perplexity(model, tokenizer, TEXT[:20000], max_tokens=1000, batch_size=2)
    assert (result.tokens, result.predicted) == (768, count)
    assert result.nll == pytest.approx(total / count, rel=1e-6)  # fp32 logits against fp64 sums of them


@pytest.mark.slow
def test_the_shipped_model_has_its_published_perplexity(model, tokenizer):
    """24.41: computed apart from this package, for the same text, 60,000 tokens and windows of 256."""
    result = perplexity(model, tokenizer, TEXT, max_tokens=60_000)
    assert abs(result.ppl - 24.41) < 0.005
    assert (result.tokens, result.predicted) == (59904, 59670)


@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_broken_logits_give_nan(fill):
    result = perplexity(Filled(fill), characters, "x" * 16, window=8)
    assert math.isnan(result.ppl)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"window": 1}, "window=1"),
        ({"window": 101}, "100 tokens are less than one window of 101"),
        ({"max_tokens": 7, "window": 8}, "7 tokens are less"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_refusals(kwargs, words):
    with pytest.raises(MPQError, match=words):
        perplexity(Uniform(64), characters, "x" * 100, **kwargs)


def test_generation_speed_counts_tokens(model, tokenizer):
    speed = generation_speed(model, tokenizer, "The old man", new_tokens=5, repeats=2)
    assert speed.prompt_tokens == len(tokenizer("The old man", add_special_tokens=False)["input_ids"])
    assert (speed.generated_tokens, speed.repeats) == (5, 2)
    assert speed.prompt_tokens_per_s > 0
    assert speed.generated_tokens_per_s > 0


def test_generation_speed_decodes_as_generate_does(model, tokenizer):
    """The timed loop feeds the model exactly the tokens of a greedy `generate`."""
    fed = []

    def recorded(input_ids, **kwargs):
        fed.append(input_ids.tolist())
        return model(input_ids=input_ids, **kwargs)

    recorded.device = model.device
    generation_speed(recorded, tokenizer, "The old man", new_tokens=6, repeats=1)
    ids = torch.tensor(fed[0])
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    assert [row[0][0] for row in fed[-6:]] == wanted


@pytest.mark.parametrize(
    ("prompt", "kwargs", "words"),
    [("", {}, "no tokens"), ("a", {"new_tokens": 0}, "new_tokens=0"), ("a", {"repeats": 0}, "repeats=0")],
)
def test_generation_speed_refusals(prompt, kwargs, words, tokenizer):
    with pytest.raises(MPQError, match=words):
        generation_speed(Uniform(64), tokenizer, prompt, **kwargs)


@torch.no_grad()
def test_a_stride_predicts_every_token_once_with_more_context(model, tokenizer):
    got = perplexity(model, tokenizer, TEXT, window=32, max_tokens=80, stride=16)
    ids = torch.tensor(tokenizer(TEXT[:2000], add_special_tokens=False)["input_ids"][:80])
    total, count, means = 0.0, 0, []
    for start in range(0, 49, 16):
        x = ids[start : start + 32]
        logp = model(input_ids=x[None]).logits[0, :-1].double().log_softmax(-1)
        losses = -logp[range(31), x[1:]]
        losses = losses if start == 0 else losses[-16:]
        total, count = total + float(losses.sum()), count + len(losses)
        means.append(float(losses.mean()))
    assert got.predicted == count == 79 and got.tokens == 80
    assert got.nll == pytest.approx(total / count, rel=1e-5)
    assert got.stderr == pytest.approx(got.ppl * float(torch.tensor(means).std()) / 2, rel=1e-4)


@pytest.mark.parametrize("stride", [0, 33])
def test_a_stride_that_leaves_tokens_out_is_refused(stride):
    with pytest.raises(MPQError, match="not in 1..32"):
        perplexity(Uniform(64), characters, "x" * 100, window=32, stride=stride)
