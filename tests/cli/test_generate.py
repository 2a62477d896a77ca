"""`mpq generate`: the tokens of the model, streamed or as JSON, and what is refused."""

import pytest
from torch._dynamo.utils import counters
from transformers import AutoTokenizer, pipeline

import mpq_kernels as mpq
from tests.made.checkpoints import tiny_model


def test_generate_is_greedy_generate(run):
    words = ["generate", "mixed", "--prompt", "The old man", "--max-new-tokens", 7]
    data = run(*words, "--json").json()
    tokenizer = AutoTokenizer.from_pretrained("mixed")
    inputs = tokenizer("The old man", return_tensors="pt")
    ids = mpq.load("mixed").generate(**inputs, max_new_tokens=7, do_sample=False, pad_token_id=0)[0]
    assert data["token_ids"] == ids[inputs["input_ids"].shape[1] :].tolist()
    assert data["new_tokens"] == len(data["token_ids"])
    streamed = run(*words)
    assert streamed.out.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert f"{data['new_tokens']} tokens in" in streamed.err
    assert run(*words, "--quiet").err == ""


def test_a_compiled_step_gives_the_same_tokens(run, without_inductor):
    words = ["generate", "mixed", "--prompt", "The old man", "--max-new-tokens", 7, "--json"]
    eager = run(*words).json()["token_ids"]
    assert counters["stats"]["unique_graphs"] == 0
    assert run(*words, "--compile").json()["token_ids"] == eager
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_int8_activations_are_those_of_load(run):
    words = ["generate", "mixed", "--prompt", "The old man", "--max-new-tokens", 7, "--json", "--activations", "int8"]
    inputs = AutoTokenizer.from_pretrained("mixed")("The old man", return_tensors="pt")
    model = mpq.load("mixed", activations="int8")
    ids = model.generate(**inputs, max_new_tokens=7, do_sample=False, pad_token_id=0)[0]
    assert run(*words).json()["token_ids"] == ids[inputs["input_ids"].shape[1] :].tolist()
    words = ["ppl", "packed", "--text", "text.txt", "--max-tokens", "600", "--window", "64", "--json"]
    exact, rounded = run(*words).json()["ppl"], run(*words, "--activations", "int8").json()["ppl"]
    assert exact != rounded and abs(exact - rounded) < 0.05 * exact


def test_generate_samples_by_seed(run):
    words = ["generate", "dense", "--prompt", "The", "--max-new-tokens", 8, "--temperature", 1, "--json"]
    first, again, other = (run(*words, "--seed", seed).json()["token_ids"] for seed in (1, 1, 2))
    assert first == again
    assert first != other  # 2048 near-equal chances, 8 times: equal by accident once in 10**26 runs


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["mixed", "--prompt", ""], "empty"),
        (["dense", "--prompt", "x", "--backend", "cpu"], "dense"),
        (["dense", "--prompt", "x", "--device", "warp"], "warp"),
        (["nowhere", "--prompt", "x"], "nowhere"),
    ],
)
def test_generate_refusals(run, words, reason):
    refused = run("generate", *words, code=1)
    assert reason in refused.err
    assert refused.out == ""


def test_a_model_without_tokenizer_is_refused(run, tmp_path):
    tiny_model("llama", tmp_path / "bare")
    assert "tokenizer" in run("generate", tmp_path / "bare", "--prompt", "x", code=1).err


def test_the_default_backend_says_why_another_cannot(run):
    refused = run("generate", "mixed", "--prompt", "x", "--backend", "triton", code=1)
    assert "triton: " in refused.err and len(refused.err.splitlines()) == 1


def test_pipelines_take_packed_folders(run):
    """Of transformers, after `import mpq_kernels`."""
    expected = run("generate", "mixed", "--prompt", "The old man", "--max-new-tokens", 7, "--json").json()
    generator = pipeline("text-generation", "mixed", device="cpu")
    (found,) = generator("The old man", max_new_tokens=7, do_sample=False, return_full_text=False)
    assert found["generated_text"] == expected["text"]
