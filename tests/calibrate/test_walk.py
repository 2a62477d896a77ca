"""The walk gives every block what the model gives it, in models whose blocks leave something for later ones."""

import gc
import threading
from pathlib import Path

import pytest
import torch
import transformers as hf

import mpq_kernels as mpq
from mpq_kernels.calibrate.calibration import Calibration, token_batches
from mpq_kernels.calibrate.experts import in_walk_order
from mpq_kernels.calibrate.hessians import Calibrator, damped
from mpq_kernels.calibrate.load import StoredModel
from mpq_kernels.calibrate.walk import BlockWalk, ModelFails, find_blocks
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.errors import QuantizeError
from mpq_kernels.packer.job import prepare
from mpq_kernels.plan.resolve import resolve
from tests.made.checkpoints import LATENT, SIZES, VOCAB, tiny_model

# Three batches.
TOKENS = torch.randint(3, VOCAB, (300, 32), generator=torch.Generator().manual_seed(0))
PLAN = mpq.Plan.from_dict({"version": 1, "default": {"bits": 4, "group_size": -1}, "modules": {}})
KINDS = ["sliding_attention", "full_attention"]
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 2}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
BART = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
}  # fmt: skip
# What a block is given besides hidden states -> (class of the model, its config).
MODELS = {
    "the choice of tokens of the block before": lambda: (
        hf.GlmMoeDsaForCausalLM,
        hf.GlmMoeDsaConfig(
            **SIZES | LATENT | {"num_hidden_layers": 3, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 8}
        ),
    ),
    "keys and values of an earlier block, inputs of its own": lambda: (
        hf.Gemma4ForCausalLM,
        hf.Gemma4TextConfig(
            **SIZES | PER_LAYER | {"num_hidden_layers": 6, "head_dim": 16, "global_head_dim": 16},
            layer_types=KINDS * 3,
        ),
    ),
    "four streams of hidden states": lambda: (
        hf.Gemma3nForCausalLM,
        hf.Gemma3nTextConfig(
            **SIZES | PER_LAYER | {"num_hidden_layers": 4, "head_dim": 16, "laurel_rank": 8},
            layer_types=KINDS * 2,
            activation_sparsity_pattern=[0.0] * 4,
        ),
    ),
    "the mask of its kind, attention or Mamba": lambda: (
        hf.BambaForCausalLM,
        hf.BambaConfig(**SIZES | MAMBA | {"num_hidden_layers": 4}, attn_layer_indices=[1, 3]),
    ),
    "the mask of its kind, attention or delta rule": lambda: (
        hf.Qwen3NextForCausalLM,
        hf.Qwen3NextConfig(**SIZES | DELTA | {"head_dim": 16}, layer_types=["linear_attention", "full_attention"]),
    ),
    "a recurrent state, returned": lambda: (
        hf.xLSTMForCausalLM,
        hf.xLSTMConfig(
            vocab_size=VOCAB, hidden_size=64, embedding_dim=64, num_hidden_layers=2, num_blocks=2, num_heads=4,
            chunk_size=16,
        ),
    ),  # fmt: skip
    "what linears before the blocks make": lambda: (
        hf.OPTForCausalLM,
        hf.OPTConfig(
            vocab_size=VOCAB, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=64,
        ),
    ),  # fmt: skip
    "what the blocks of an encoder make": lambda: (
        hf.BartForConditionalGeneration,
        hf.BartConfig(vocab_size=VOCAB, **BART),
    ),
}  # fmt: skip


def saved(made, path: Path):
    """The model of a row of MODELS, and its checkpoint."""
    kind, config = made()
    torch.manual_seed(0)
    model = kind(config).float().eval()
    model.save_pretrained(path)
    return model, DenseCheckpoint.open(path)


def plain_run(model, tokens):
    """Linear -> fp64 [n, K], all that it reads in a plain run of the model."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear:
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2).double())
                )
            )
    given = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False, **given)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


@pytest.mark.parametrize("case", MODELS)
def test_hessians_are_those_of_a_plain_run(case, tmp_path):
    model, source = saved(MODELS[case], tmp_path / "m")
    resolved = prepare(source, PLAN, "gptq", calibrated=True)  # the trial has nothing to say
    seen = plain_run(model, TOKENS)
    calibrator = Calibrator(source, Calibration(tokens=TOKENS, damping=0.01))
    assert len(calibrator.walk.batches) == 3
    compared = 0
    for spec in (member.spec for weight in resolved.weights for member in weight.members):
        found = calibrator.hessian(spec.name)
        if spec.expert is None:
            x = seen[spec.name]
            wanted = damped(x.T @ x / len(x), 0.01)
            # Sums of fp32 products of the model and of its hidden states: a few roundings of 2^-24.
            assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.diagonal().max()), spec.name
            compared += 1
    assert compared == sum(spec.expert is None for spec in source.linears())


def test_later_blocks_read_keys_and_values_of_quantized_ones(tmp_path):
    """What an earlier block leaves is what it makes with its new weights, and its own last word."""
    model, source = saved(MODELS["keys and values of an earlier block, inputs of its own"], tmp_path / "m")
    calibrator = Calibrator(source, Calibration(tokens=TOKENS, damping=0.01))
    for layer in (2, 3):
        for linear in ("k_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{linear}"
            calibrator.hessian(name)
            halved = model.get_submodule(name).weight.detach() * 0.5
            calibrator.set_weight(name, halved)
            with torch.no_grad():
                model.get_submodule(name).weight.copy_(halved)
    for name in ("model.layers.4.self_attn.o_proj", "model.layers.5.self_attn.o_proj"):
        x = plain_run(model, TOKENS)[name]
        wanted = damped(x.T @ x / len(x), 0.01)
        assert float((calibrator.hessian(name) - wanted).abs().max()) <= 1e-5 * float(wanted.diagonal().max())


@pytest.mark.parametrize("quantizer", ["gptq", "hqq"])
def test_a_model_with_shared_keys_is_packed(quantizer, tmp_path):
    saved(MODELS["keys and values of an earlier block, inputs of its own"], tmp_path / "m")
    mpq.pack(tmp_path / "m", tmp_path / "out", PLAN, quantizer, Calibration(tokens=TOKENS[:4]))
    with torch.no_grad():
        assert torch.isfinite(mpq.load(tmp_path / "out")(TOKENS[:1]).logits).all()


REFUSED = {
    "weights that change before the first block": (
        lambda: (
            hf.RwkvForCausalLM,
            hf.RwkvConfig(
                vocab_size=VOCAB, context_length=64, hidden_size=64, num_hidden_layers=8, attention_hidden_size=64,
                intermediate_size=128,
            ),
        ),
        "RwkvForCausalLM changes the weights of its blocks when it is first run",
    ),
    "a linear that is read and never called": (
        lambda: (
            hf.MambaForCausalLM,
            hf.MambaConfig(vocab_size=VOCAB, hidden_size=64, state_size=8, num_hidden_layers=2),
        ),
        r"layers.0.mixer.dt_proj: no token of the first 8 calibration tokens reaches this linear; keep it in 16 bits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_calibrated_is_refused_before_the_work(case, tmp_path, monkeypatch):
    made, words = REFUSED[case]
    _, source = saved(made, tmp_path / "m")
    monkeypatch.setattr("mpq_kernels.packer.job.quantize_weight", None)
    with pytest.raises(QuantizeError, match=words):
        mpq.pack(tmp_path / "m", tmp_path / "out", PLAN, "gptq", Calibration(tokens=TOKENS))
    assert not list(tmp_path.glob("*out*"))


class Looped(torch.nn.Module):
    """Two blocks that are run twice. cross: the second one has the first one's weight."""

    def __init__(self, cross: bool = False) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, 4)
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2)])
        self.config = hf.LlamaConfig()
        self.all_tied_weights_keys = {"blocks.1.0.weight": "blocks.0.0.weight"} if cross else {}

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, use_cache):
        hidden = self.embedding(input_ids)
        for block in [*self.blocks, *self.blocks]:
            hidden = block(hidden)
        return hidden


def test_blocks_that_are_run_again_are_refused():
    walk = BlockWalk(Looped(), token_batches(TOKENS), torch.device("cpu"), lambda stage: None)
    walk.advance()
    with pytest.raises(QuantizeError, match=r"Looped runs blocks.0 again after blocks.1, .* comes by each block once"):
        walk.advance()


def test_weights_that_blocks_share_are_refused():
    with pytest.raises(QuantizeError, match=r"blocks.1.0.weight is the same weight as blocks.0.0.weight"):
        BlockWalk(Looped(cross=True), token_batches(TOKENS), torch.device("cpu"), lambda stage: None)


def test_errors_of_the_model_come_in_words():
    model = Looped()
    model.embedding.forward = lambda tokens: tokens.none
    with pytest.raises(ModelFails, match=r"cannot be run on tokens alone, .* \(AttributeError: .*none.*'rtn' or 'hqq'"):
        BlockWalk(model, token_batches(TOKENS), torch.device("cpu"), lambda stage: None)
    model = Looped()
    model.blocks[0][0] = torch.nn.Linear(5, 4)
    walk = BlockWalk(model, token_batches(TOKENS), torch.device("cpu"), lambda stage: None)
    with pytest.raises(ModelFails, match=r"\(RuntimeError: .*shapes"):
        walk.forward(0)


class Writing(torch.nn.Module):
    """A block that adds 1 to the very tensor that it is given, and to a list."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, hidden, counts):
        counts.append(len(counts))
        hidden += 1
        return hidden + self.linear(hidden)


def test_blocks_that_write_into_their_arguments_are_run_on_copies():
    model, given = Looped(), []

    def forward(input_ids, use_cache):
        hidden, counts = model.embedding(input_ids), []
        for block in model.blocks:
            hidden = block(hidden, counts)
        given.append(counts)
        return hidden

    model.forward = forward
    for index in range(2):
        model.blocks[index] = Writing()
    with torch.no_grad():
        wanted = model(TOKENS[:4], False)
        walk = BlockWalk(model, token_batches(TOKENS[:4]), torch.device("cpu"), lambda stage: None)
        for _ in range(2):
            for _ in range(3):
                walk.forward(0)
            walk.advance()
    assert torch.equal(walk.hidden[0], wanted)
    assert given == [[0, 1], [0, 1]]


def test_threads_end_with_the_walk(tmp_path):
    """A pass computes with one thread, or each would hold as many as its caller has."""
    tiny_model("llama", tmp_path / "m")
    before, count, seen = set(threading.enumerate()), torch.get_num_threads(), []
    torch.set_num_threads(2)
    dense = StoredModel(DenseCheckpoint.open(tmp_path / "m"), torch.device("cpu"))
    embedding = dense.model.get_input_embeddings()
    embedding.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    norm = dense.model.model.norm
    norm.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    walk = BlockWalk(dense.model, token_batches(TOKENS), torch.device("cpu"), dense.load)
    passes = [thread for thread in threading.enumerate() if thread not in before and thread.name == "calibration pass"]
    assert len(passes) == 3
    walk.advance()
    walk.advance()
    assert torch.get_num_threads() == 2 and seen == [1] * 6
    torch.set_num_threads(count)
    del walk
    gc.collect()
    for thread in passes:
        thread.join(10)
    assert not any(thread.is_alive() for thread in passes)


def test_blocks_are_those_of_every_stack():
    linear = torch.nn.Linear(2, 2)
    inner = torch.nn.ModuleList([torch.nn.Sequential(linear), torch.nn.Sequential(torch.nn.ModuleList([linear]))])
    model = torch.nn.ModuleDict({"a": inner, "heads": torch.nn.ModuleList([linear]), "b": inner[:1]})
    assert list(find_blocks(model)) == ["a.0", "a.1", "b.0"]
    with pytest.raises(QuantizeError, match="Linear has none; choose a quantizer that needs no calibration: 'rtn' or"):
        find_blocks(linear)


def test_linears_before_the_blocks_come_last(tmp_path):
    """They are known when the walk is through: in model order, the first block would have been passed by then."""
    _, source = saved(MODELS["what linears before the blocks make"], tmp_path / "m")
    resolved = resolve(PLAN, source.linears())
    names = [weight.name for weight in in_walk_order(resolved, source).weights]
    assert names[0] == "model.decoder.layers.0.self_attn.k_proj" != resolved.weights[0].name
    assert names[-3:] == ["model.decoder.project_out", "model.decoder.project_in", "lm_head"]
