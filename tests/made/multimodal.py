"""Tiny random models that read more than text, on disk, with inputs for them: images, or sound.

source = tiny_multimodal("qwen3_vl", tmp_path / "model")
model(**inputs("qwen3_vl", model.config))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

VOCAB = 160
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
GRID = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 72, "num_heads": 4, "out_hidden_size": 64, "patch_size": 8,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
IMAGE = 150  # token id
SOUND: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 128, "num_mel_bins": 8,
    "max_source_positions": 20, "max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
# family -> (config class, class of the model, values of the config)
FAMILIES: dict[str, tuple[Any, Any, Mapping[str, Any]]] = {
    "idefics3": (
        transformers.Idefics3Config,
        transformers.Idefics3ForConditionalGeneration,
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"image_size": 32, "patch_size": 8},
            "image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": 0, "tie_word_embeddings": False,
        },
    ),
    "qwen3_vl": (
        transformers.Qwen3VLConfig,
        transformers.Qwen3VLForConditionalGeneration,
        {
            "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
            "vision_config": GRID, "image_token_id": IMAGE, "video_token_id": 151, "vision_start_token_id": 152,
            "vision_end_token_id": 153, "tie_word_embeddings": False,
        },
    ),
    "llava": (  # stored under the names of an older version
        transformers.LlavaConfig,
        transformers.LlavaForConditionalGeneration,
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
            "image_token_id": IMAGE, "vision_feature_layer": -1, "tie_word_embeddings": False,
        },
    ),
    "llama4": (  # experts, a head inside of its language model
        transformers.Llama4Config,
        transformers.Llama4ForConditionalGeneration,
        {
            "text_config": TEXT | {
                "intermediate_size_mlp": 96, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_layers": [1],
                "no_rope_layers": [1, 0],
            },
            "vision_config": VISION | {
                "image_size": 32, "patch_size": 8, "intermediate_size": 128, "vision_output_dim": 32,
                "projector_input_dim": 32, "projector_output_dim": 32,
            },
            "image_token_id": IMAGE, "image_token_index": IMAGE, "tie_word_embeddings": False,
        },
    ),
    "qwen2_audio": (
        transformers.Qwen2AudioConfig,
        transformers.Qwen2AudioForConditionalGeneration,
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "audio_config": {
                "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
                "num_mel_bins": 8, "max_source_positions": 16,
            },
            "audio_token_id": IMAGE, "tie_word_embeddings": False,
        },
    ),
    "whisper": (transformers.WhisperConfig, transformers.WhisperForConditionalGeneration, SOUND),
}  # fmt: skip


def tiny_multimodal(family: str, path: Path, **changes: Any) -> Path:
    """Write a random checkpoint of `family` to `path`, which is returned. changes: of the config, those of its text."""
    config_class, model_class, values = FAMILIES[family]
    values = {key: value | changes if key == "text_config" else value for key, value in values.items()} | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config_class(**values))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # fresh norms are one and biases zero, which would hide mistakes
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return path


def _ids(image_tokens: int) -> torch.Tensor:
    return torch.tensor([[5, *[IMAGE] * image_tokens, 17, 9, 33]])


def _tiles(random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": _ids(4), "pixel_values": random(1, 1, 3, 32, 32)}


def _patches(random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    grid, ids = torch.tensor([[1, 4, 4]]), _ids(4)
    kinds = (ids == IMAGE).int()
    return {"input_ids": ids, "pixel_values": random(16, 384), "image_grid_thw": grid, "mm_token_type_ids": kinds}


def _sound(random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": torch.tensor([[1, 17, 9, 33]]), "input_features": random(1, 8, 40)}


def _square(random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": _ids(16), "pixel_values": random(1, 3, 32, 32)}


def _shuffled(random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": _ids(4), "pixel_values": random(1, 3, 32, 32)}


def _heard(random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    ids, mask = _ids(8), torch.ones(1, 32, dtype=torch.int64)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": random(1, 8, 32),
        "feature_attention_mask": mask,
    }  # fmt: skip


INPUTS = {
    "idefics3": _tiles, "qwen3_vl": _patches, "whisper": _sound, "llava": _square, "llama4": _shuffled,
    "qwen2_audio": _heard,
}  # fmt: skip
# Llama 4 of transformers 5.24 reads this from what its language model returns, and fails without it.
MoeCausalLMOutputWithPast.image_outputs = getattr(MoeCausalLMOutputWithPast, "image_outputs", None)


def inputs(family: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """Keywords of forward: a row of tokens with an image or sound of random values."""
    generator = torch.Generator().manual_seed(seed)
    return INPUTS[family](lambda *shape: torch.randn(*shape, generator=generator))
