"""Tiny random models whose linears are not nn.Linear: GPT-2 and OpenAI GPT (Conv1D, [K, N]), Falcon (FalconLinear)."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, OpenAIGPTConfig, PreTrainedModel

OLD = {"vocab_size": 160, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64}
OTHER_LINEARS = {
    "gpt2": GPT2Config(**OLD, bos_token_id=1, eos_token_id=2),
    "openai-gpt": OpenAIGPTConfig(**OLD),
    "falcon": FalconConfig(vocab_size=160, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, bias=True),
}


def tiny_other(family: str, path: Path) -> PreTrainedModel:
    """Write a random checkpoint to `path` and return its model, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(OTHER_LINEARS[family])
        with torch.no_grad():  # fresh biases are zero, which would hide mistakes
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return model.eval()
