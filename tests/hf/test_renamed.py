"""Checkpoints whose tensors transformers renames, splits or transposes: packed, loaded, saved and loaded again."""

import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import mpq_kernels as mpq
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.nn.linear import packed_modules
from tests.made.checkpoints import SIZES
from tests.made.twins import dequantized_twin

PLAIN = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
IDS = torch.arange(3, 15)[None]
CONFIGS = {
    "embed_out becomes lm_head": lambda: transformers.GPTNeoXConfig(**PLAIN),
    "input_linear becomes gate_up_proj": lambda: transformers.GraniteMoeConfig(**SIZES, **MIXTURE),
    "backbone becomes model, experts without a gate": lambda: transformers.NemotronHConfig(
        **SIZES | {"num_hidden_layers": 3}, head_dim=16, layers_block_type=["mamba", "moe", "attention"],
        mamba_num_heads=8, mamba_head_dim=16,
        ssm_state_size=8, n_groups=1, chunk_size=16, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=64, moe_shared_expert_intermediate_size=64,
    ),
    "a tied bias": lambda: transformers.RobertaConfig(**PLAIN, is_decoder=True),
    "gqkv_proj and gate_up_proj are split": lambda: transformers.HrmTextConfig(
        **SIZES, num_layers_per_stack=1, head_dim=16, H_cycles=1, L_cycles=1, L_bp_cycles=[1]
    ),
    "experts are transposed": lambda: transformers.AriaTextConfig(
        **SIZES, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1, head_dim=16
    ),
}  # fmt: skip


def dense(name, path):
    """A random model of this kind, saved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():  # fresh biases are zero, which would hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path)
    return path


def mixed(path, keep=()) -> mpq.Plan:
    """8 to 2 bits in turn; what ends in a word of `keep` stays as it is."""
    specs = DenseCheckpoint.open(path).linears()
    bits = {spec.name: 16 if spec.name.endswith(tuple(keep)) and keep else 8 - i % 7 for i, spec in enumerate(specs)}
    rules = {name: {"bits": width, "group_size": -1} for name, width in bits.items()}
    return mpq.Plan.model_validate({"version": 1, "modules": rules})


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module", params=CONFIGS)
def packed(request, tmp_path_factory):
    """(dense directory, packed directory) of one kind."""
    root = tmp_path_factory.mktemp("renamed")
    source = dense(request.param, root / "dense")
    mpq.pack(source, root / "packed", mixed(source), quantizer="rtn")
    return source, root / "packed"


def test_every_linear_is_packed_with_its_own_weight(packed):
    source, out = packed
    model, whole = mpq.load(out), AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager")
    checkpoint = DenseCheckpoint.open(source)
    for spec in checkpoint.linears():
        if spec.expert is None:
            module = whole.get_submodule(spec.name)
            assert torch.equal(
                checkpoint.weight(spec), spec.weight_of(module.weight) if spec.transposed else module.weight
            )
            assert (module.bias is None) == (checkpoint.bias(spec) is None)
            assert module.bias is None or torch.equal(checkpoint.bias(spec), module.bias)
    twin = dequantized_twin(model, source)
    found, wanted = logits(model), logits(twin)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()  # fp32 sums in another order


def test_save_pretrained_writes_what_was_loaded(packed, tmp_path):
    _, out = packed
    model = AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(tmp_path)
    before, after = load_file(out / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    own = PackedCheckpoint.open(out).modules
    for name in before:
        if name.rpartition(".")[0] in own:
            assert torch.equal(before[name], after[name]), name
    assert torch.equal(logits(mpq.load(tmp_path)), logits(model))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), logits(model))


def test_the_base_model_alone(packed):
    _, out = packed
    model = AutoModel.from_pretrained(out)
    whole = mpq.load(out)
    base = whole.base_model
    assert packed_modules(model)
    with torch.no_grad():
        found, wanted = (m(input_ids=IDS).last_hidden_state for m in (model.eval(), base))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("keep", [("q_proj",), ("k_proj", "gate_proj"), ("lm_head", "v_proj", "up_proj")])
def test_parts_of_one_stored_tensor_may_be_kept(keep, tmp_path):
    source = dense("gqkv_proj and gate_up_proj are split", tmp_path / "dense")
    mpq.pack(source, tmp_path / "packed", mixed(source, keep), quantizer="rtn")
    assert not any("gqkv" in name for name in PackedCheckpoint.open(tmp_path / "packed").tensors)
    model = mpq.load(tmp_path / "packed")
    twin = dequantized_twin(model, source)
    found, wanted = logits(model), logits(twin)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(mpq.load(tmp_path / "saved")), found)


def test_a_missing_part_is_refused_before_any_work(tmp_path):
    source = dense("gqkv_proj and gate_up_proj are split", tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if "gqkv_proj" in name)
    tensors[name] = tensors[name][:-1].clone()  # does not fit the four that are made of it
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(mpq.CheckpointError, match="config and weights belong to different models"):
        mpq.pack(source, tmp_path / "out", mpq.Plan.uniform(tmp_path / "dense", bits=4, group_size=-1), quantizer="rtn")
    assert not (tmp_path / "out").exists()
