"""`load(..., compile=True)`: the tokens of the eager model, one compilation of the decode step, no graph break."""

import json
import os

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from transformers import AutoModelForCausalLM, GenerationConfig

import mpq_kernels as mpq
from mpq_kernels.evaluate.speed import ModelFacts, measure
from mpq_kernels.hf import compiled, decode_attention
from tests.made.checkpoints import tiny_model
from tests.made.mixtures import generate

PROMPTS = (torch.arange(3, 9)[None], torch.arange(20, 31)[None])
BATCH = torch.tensor([[3, 4, 5, 6, 7, 8], [0, 0, 0, 7, 8, 9]])  # the second prompt is shorter
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def packed(root, family, **sizes):
    """A packed model with fused groups, where the family has separate projections."""
    tiny_model(family, root / "dense", sizes=sizes)
    plan = mpq.Plan.uniform(root / "dense", bits=4, group_size=-1, lm_head=8).model_dump(mode="json")
    if family in ("llama", "qwen3", "gemma3"):
        plan["fuse"] = [
            {"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]},
            {"name": "gate_up_proj", "members": ["gate_proj", "up_proj"]},
        ]
    mpq.pack(root / "dense", root / "packed", mpq.Plan.model_validate(plan), quantizer="rtn")
    return root / "packed"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A packed Llama with fused groups, of one layer."""
    return packed(tmp_path_factory.mktemp("compiled"), "llama", num_hidden_layers=1)


def tokens(model):
    """Greedy continuations of prompts of two lengths, and of a batch of prompts of two lengths."""
    found = [model.generate(prompt, max_new_tokens=8, **GREEDY) for prompt in PROMPTS]
    mask = (BATCH != 0).long()
    return [*found, model.generate(BATCH, attention_mask=mask, max_new_tokens=8, **GREEDY)]


@pytest.mark.skipif(os.environ.get("MPQ_TEST_EXPORT") != "1", reason="compiles for long: make test-export")
def test_inductor_gives_the_same_tokens(llama, fresh):
    if (reason := compiled.why_no_compiler("cpu")) is not None:
        pytest.skip(reason)
    eager, model = mpq.load(llama), mpq.load(llama, compile=True)
    for prompt in PROMPTS:
        assert torch.equal(
            model.generate(prompt, max_new_tokens=12, **GREEDY), eager.generate(prompt, max_new_tokens=12, **GREEDY)
        )
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize(("family", "graphs"), [("llama", 1), ("mixtral", 1), ("gemma3", 2)])
def test_decode_steps_are_traced_once(family, graphs, tmp_path, without_inductor):
    """Once for each batch size; Gemma 3 counts the positions of its window in Python, which becomes a symbol."""
    path = packed(tmp_path, family)
    expected = tokens(mpq.load(path))
    model = mpq.load(path, compile=True)
    found = [model.generate(PROMPTS[0], max_new_tokens=8, **GREEDY)]
    assert counters["stats"]["unique_graphs"] == graphs
    found.append(model.generate(PROMPTS[1], max_new_tokens=8, **GREEDY))
    assert counters["stats"]["unique_graphs"] == graphs, "a prompt of another length was compiled again"
    found.append(model.generate(BATCH, attention_mask=(BATCH != 0).long(), max_new_tokens=8, **GREEDY))
    before = counters["stats"]["unique_graphs"]
    assert before == graphs + 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    tokens(model)
    assert counters["stats"]["unique_graphs"] == before and not counters["graph_break"]


def test_generation_configs_and_sampling(llama, without_inductor):
    eager, model = mpq.load(llama), mpq.load(llama, compile=True)
    config = GenerationConfig(max_new_tokens=6, temperature=0.8, top_k=5, **GREEDY | {"do_sample": True})
    found = []
    for each in (eager, model):
        torch.manual_seed(3)
        found.append(each.generate(PROMPTS[0], generation_config=config))
    assert torch.equal(*found)
    assert counters["stats"]["unique_graphs"] == 1


def test_what_is_saved_is_not_compiled(llama, tmp_path):
    model = mpq.load(llama, compile=True)
    model.save_pretrained(tmp_path / "saved")
    mpq.load(llama).save_pretrained(tmp_path / "plain")
    for name in ("generation_config.json", "config.json"):
        saved, plain = (json.loads((tmp_path / each / name).read_text()) for each in ("saved", "plain"))
        assert saved == plain
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not compiled.is_compiled(again) and torch.equal(generate(again).sequences, generate(model).sequences)


def test_a_longer_cache_by_name(llama, without_inductor):
    model = mpq.load(llama, compile=True)
    assert model.generation_config.max_cache_len == 128  # the positions of the model
    compiled.compile_decoding(model, 32)
    out = model.generate(PROMPTS[0], max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    cache = getattr(out, "cache", None) or out.past_key_values
    assert cache.layers[0].keys.shape[2] == 32


def test_bench_runs_what_generate_runs(llama, without_inductor):
    model = mpq.load(llama, compile=True)
    assert ModelFacts.of(model).run == "compiled" and ModelFacts.of(mpq.load(llama)).run == "eager"
    assert [test.name for test in measure(model, [4], [3], [1], 2)] == ["pp4", "tg3"]
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    decoder = compiled.Decoder(model, 1, 8)
    prompt = decoder(PROMPTS[0])
    step = decoder(prompt.logits[:, -1:].argmax(-1))
    eager = mpq.load(llama)(torch.cat([PROMPTS[0], prompt.logits[:, -1:].argmax(-1)], 1), use_cache=False)
    torch.testing.assert_close(step.logits[:, -1], eager.logits[:, -1], rtol=1e-4, atol=1e-5)
    decoder.reset()
    assert torch.equal(decoder(PROMPTS[0]).logits, prompt.logits)


def test_no_compiler_is_said_in_words(llama, monkeypatch):
    words = r"LlamaForCausalLM is not compiled here: there is no C\+\+ compiler"
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(mpq.UnsupportedError, match=words):
        mpq.load(llama, compile=True)
    monkeypatch.setattr(compiled.sysconfig, "get_path", lambda name: "/nowhere")
    assert "Python's headers are missing" in compiled.why_no_compiler("cpu")
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    assert "triton is not installed" in compiled.why_no_compiler("cuda")


def test_models_that_are_not_compiled(llama):
    model = mpq.load(llama)
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(mpq.UnsupportedError, match="several devices, or offloaded"):
        compiled.compile_decoding(model)
    with pytest.raises(mpq.UnsupportedError, match="generates no text"):
        compiled.compile_decoding(mpq.load(llama).model)


@pytest.mark.parametrize("mask", ["none", "bool", "added", "heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention_is_that_of_torch(mask, dtype):
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(2, heads, length, 16, generator=generator).to(dtype) for heads, length in ((6, 1), (2, 24), (2, 24))
    )
    seen = torch.rand(2, 1 if mask != "heads" else 6, 1, 24, generator=generator) < 0.6
    seen[..., 0] = True
    given = {"none": None, "bool": seen, "heads": seen}.get(mask, torch.where(seen, 0.0, -1e9))
    if given is not None and mask == "added":
        given = given.to(dtype)
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    module.is_causal = True

    def run(q):
        return decode_attention.decode_attention(module, q, key, value, given, scaling=0.2)[0]

    wanted = run(query)
    found = torch.compile(run, backend="eager", fullgraph=True)(query)
    exact = decode_attention.sdpa_attention_forward(
        module, query.double(), key.double(), value.double(), given if mask != "added" else given.double(), scaling=0.2
    )[0]
    assert found.shape == wanted.shape and not torch.equal(found, exact)
    # One rounding of the output; before that, sums of 24 and 16 products in fp32.
    unit = 2**-8 if dtype == torch.bfloat16 else 2**-20
    assert ((found.double() - exact).abs() <= unit * exact.abs() + 1e-5).all()
