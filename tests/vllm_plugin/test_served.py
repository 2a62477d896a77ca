"""vLLM serves packed folders over HTTP on the CPU: its greedy tokens are those of `mpq.load`.

make test-vllm        installs vLLM in an environment of its own and runs this file
"""

import importlib.util
import random
from concurrent.futures import ThreadPoolExecutor
from threading import local

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("make test-vllm installs vLLM in an environment of its own", allow_module_level=True)

import peft

import mpq_kernels as mpq
from tests.made.served import MODELS, PROMPTS, Client, greedy, packed_model, server, settled

TOKENS = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    return {name: packed_model(name, root) for name in MODELS}


@pytest.fixture(scope="module")
def expected(made):
    """Name -> greedy tokens of each prompt."""
    out = {}
    for name, path in made.items():
        model = mpq.load(path, dtype=torch.float32)
        out[name] = [settled(model, prompt, greedy(model, prompt, TOKENS)) for prompt in PROMPTS]
        assert sum(map(len, out[name])) >= TOKENS * len(PROMPTS) * 3 // 4
    return out


@pytest.fixture(scope="module")
def adapter(made):
    """A LoRA adapter of peft on the packed Llama, and the tokens with it."""
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(
        mpq.load(made["llama"], dtype=torch.float32), peft.LoraConfig(r=8, target_modules=targets)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    path = made["llama"].parent / "adapter"
    model.save_pretrained(path)
    return path, [greedy(model, prompt, TOKENS) for prompt in PROMPTS]


def served(port, wanted, model="packed"):
    """As many tokens of each prompt as are wanted."""
    client = Client(port)
    return [client.complete(p, TOKENS, model)[: len(tokens)] for p, tokens in zip(PROMPTS, wanted, strict=True)]


def test_llama_with_an_adapter_and_under_load(made, expected, adapter, tmp_path):
    path, with_adapter = adapter
    assert with_adapter != expected["llama"]
    flags = ("--enforce-eager", "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"added={path}")
    with server(made["llama"], tmp_path / "log", *flags) as port:
        assert served(port, expected["llama"]) == expected["llama"]
        assert served(port, with_adapter, "added") == with_adapter
        check_load(port)


def check_load(port, requests=2000, together=64):
    """Many requests at once get what each gets alone."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 2048) for _ in range(rng.randrange(1, 40))] for _ in range(40)]
    client = Client(port)
    alone = [client.complete(prompt, 4) for prompt in prompts]
    here = local()

    def ask(number):
        if not hasattr(here, "client"):
            here.client = Client(port)
        return here.client.complete(prompts[number % len(prompts)], 4) == alone[number % len(prompts)]

    with ThreadPoolExecutor(together) as pool:
        same = list(pool.map(ask, range(requests)))
    assert len(same) == requests
    assert all(same), f"{same.count(False)} of {requests} answers differ from those of single requests"


@pytest.mark.parametrize("name", ["qwen3", "mixture", "mixtral"])
def test_other_families(name, made, expected, tmp_path):
    with server(made[name], tmp_path / "log", "--enforce-eager") as port:
        assert served(port, expected[name]) == expected[name]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_two_ranks_are_one(name, made, expected, tmp_path):
    with server(made[name], tmp_path / "log", "--enforce-eager", "--tensor-parallel-size", "2") as port:
        assert served(port, expected[name]) == expected[name]
    said = (tmp_path / "log").read_text()
    assert "k_proj on rank 1: " in said or "qkv_proj on rank 1: " in said
    assert ("this rank holds 2 of 4 experts" in said) == (name in ("mixture", "mixtral"))


def test_compiled(made, expected, tmp_path):
    with server(made["llama"], tmp_path / "log") as port:
        assert served(port, expected["llama"]) == expected["llama"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_dtypes(dtype, made, tmp_path):
    """Roundings of vLLM's own layers differ from transformers': the first tokens are the same."""
    model = mpq.load(made["llama"], dtype=getattr(torch, dtype))
    with server(made["llama"], tmp_path / "log", "--enforce-eager", dtype=dtype) as port:
        wanted = [greedy(model, prompt, 4) for prompt in PROMPTS]
        assert served(port, wanted) == wanted
