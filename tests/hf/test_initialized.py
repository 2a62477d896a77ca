"""Families whose _init_weights writes into `weight` of child modules: a packed layer is never initialized."""

import pytest
import torch
from transformers import (
    FalconMambaConfig,
    GPTBigCodeConfig,
    Mamba2Config,
    MambaConfig,
    ModernBertDecoderConfig,
    NanoChatConfig,
    RecurrentGemmaConfig,
    initialization,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import mpq_kernels as mpq
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.nn.linear import packed_modules
from tests.made.checkpoints import SIZES, tiny_model
from tests.made.twins import dequantized_twin

RECURRENT = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 8, "pad_token_id": 0}
ALL_HEADS = SIZES | {"num_key_value_heads": 4}
# rescale_prenorm_residual: out_proj.weight is written in place, not through transformers' functions.
WRITERS = {
    "mamba": MambaConfig(**RECURRENT, rescale_prenorm_residual=True),
    "mamba2": Mamba2Config(
        **RECURRENT, head_dim=16, num_heads=8, n_groups=1, chunk_size=16, rescale_prenorm_residual=True
    ),
    "falcon_mamba": FalconMambaConfig(**RECURRENT),
    "gpt_bigcode": GPTBigCodeConfig(
        vocab_size=160, n_embd=64, n_head=4, n_layer=2, n_positions=64, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
    ),
    "recurrent_gemma": RecurrentGemmaConfig(
        **(ALL_HEADS | {"num_key_value_heads": 1, "num_hidden_layers": 3}), lru_width=64, attention_window_size=32
    ),
    "nanochat": NanoChatConfig(**ALL_HEADS),
    "modernbert_decoder": ModernBertDecoderConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
}


def plan_for(path) -> mpq.Plan:
    """5 bits everywhere, q/k/v fused where they are apart."""
    apart = any(spec.name.endswith(".q_proj") for spec in DenseCheckpoint.open(path).linears())
    fuse = [{"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]}] if apart else []
    return mpq.Plan.model_validate({"version": 1, "default": {"bits": 5, "group_size": -1}, "fuse": fuse})


@pytest.mark.parametrize("family", WRITERS)
def test_logits_equal_the_dequantized_model(family, tmp_path):
    config = WRITERS[family]
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    model.save_pretrained(tmp_path / "source")
    mpq.pack(tmp_path / "source", tmp_path / "packed", plan_for(tmp_path / "source"), quantizer="rtn")
    packed = mpq.load(tmp_path / "packed")
    assert packed_modules(packed)
    dense, ids = dequantized_twin(packed, tmp_path / "source"), torch.arange(3, 15)[None]
    for training in (False, True):  # in training, mixers hand more weights to their kernels
        with torch.no_grad():
            got, wanted = (model.train(training)(input_ids=ids).logits for model in (packed, dense))
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()  # fp32 sums in another order


def test_initializing_again_changes_nothing(tmp_path):
    model = tiny_model("qwen2", tmp_path / "source")  # q, k and v have biases
    mpq.replace_linears(model, plan_for(tmp_path / "source"), "rtn")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.model.layers[0].self_attn
    for module in (attention.q_proj, attention.qkv_proj, attention.o_proj):
        model._initialize_weights(module)
    for part in (attention.q_proj.weight, attention.q_proj.bias, attention.o_proj.weight):
        initialization.zeros_(part)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
