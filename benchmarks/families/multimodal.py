"""Families that read images or sound, and what their tiny configs need besides shrink.py."""

from __future__ import annotations

from typing import Any

from . import media
from .cases import Case, Changes, Kind
from .shrink import HEAD, HIDDEN, merged

SIDE, PATCH = 32, 8  # of pictures: 16 patches
MROPE = [4, 2, 2]  # pairs of a head's dimensions for time, height and width
ROPE: Changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": MROPE}}
NEXT: Changes = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]}
GLM: Changes = {
    "text_config": {"rope_parameters": ROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}},
    "vision_config": {"out_hidden_size": HIDDEN, "intermediate_size": 96},
}
QFORMER: Changes = {
    "image_token_index": 150,
    "num_query_tokens": 4,
    "qformer_config": {"encoder_hidden_size": HIDDEN, "hidden_size": HIDDEN},
}
# model type -> changes of its tiny config.
CHANGES: dict[str, Changes] = {
    "aria": {"projector_patch_to_query_dict": {16: 8}, "text_config": {"intermediate_size": 64}},
    "blip": {"text_config": {"encoder_hidden_size": HIDDEN}},
    "blip-2": QFORMER,
    "glm46v": GLM,
    "glm4v": GLM,
    "glm_ocr": GLM,
    "glmga": GLM,
    "glm4v_moe": merged(GLM, {"text_config": {"head_dim": 2 * HEAD}}),
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "instructblip": QFORMER,
    "instructblipvideo": QFORMER | {"video_token_index": 150},
    "idefics3": {"scale_factor": 2},
    "smolvlm": {"scale_factor": 2},
    "llama4": {
        "vision_config": {
            "intermediate_size": 4 * HIDDEN, "vision_output_dim": HIDDEN, "projector_input_dim": HIDDEN,
            "projector_output_dim": HIDDEN,
        },
        "text_config": {"intermediate_size_mlp": 128, "no_rope_layers": [1, 0], "moe_layers": [1]},
    },
    "llava_next": NEXT,
    "llava_next_video": NEXT,
    "llava_onevision": NEXT,
    "mistral3": {"vision_config": {"head_dim": HEAD}},
    "mllama": {
        "text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {
            "num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 2 * HIDDEN,
            "attention_heads": 4, "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
    },
    "paligemma": {"projection_dim": HIDDEN, "vision_config": {"projection_dim": HIDDEN}},
    "qwen2_5_vl": {"vision_config": {"fullatt_block_indexes": [0], "window_size": 16}, "text_config": ROPE},
    "qwen2_vl": {"vision_config": {"embed_dim": HIDDEN, "hidden_size": HIDDEN}, "text_config": ROPE},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "glmasr": {"audio_config": {"intermediate_size": 4 * HIDDEN}},
    "qwen3_asr": {"audio_config": {"output_dim": HIDDEN, "downsample_hidden_size": 16, "n_window": 16}},
    "voxtral": {"audio_token_id": 150, "audio_config": {"intermediate_size": 4 * HIDDEN}},
    "voxtral_realtime": {"audio_config": {"intermediate_size": 4 * HIDDEN}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 140, "text_config": ROPE},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 140, "text_config": ROPE},
    "gemma4": {
        "vision_config": {
            "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "head_dim": HEAD, "global_head_dim": HEAD, "patch_size": PATCH,
            "pooling_kernel_size": 2, "position_embedding_size": 64, "default_output_length": 4,
        },
    },
    "janus": {
        "vision_config": {"projection_dim": HIDDEN, "num_image_tokens": 16},
        "vq_config": {
            "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_embeddings": 64,
            "latent_channels": 32, "embed_dim": 8, "projection_dim": HIDDEN, "image_token_embed_dim": HIDDEN,
            "num_patches": 4,
        },
    },
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "vision-encoder-decoder": {},
}  # fmt: skip


def common(config: Any) -> dict[str, Any]:
    """What a tiny config needs in any family: small pictures, and rotations of three axes that fit small heads."""
    out: dict[str, Any] = {}
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None and (found := common(inner)):
            out[name] = found
    sizes = (("image_size", SIDE), ("patch_size", PATCH))
    out |= {name: size for name, size in sizes if type(getattr(config, name, None)) is int}
    if type(getattr(config, "image_size", None)) is list or type(getattr(config, "image_size", None)) is tuple:
        out["image_size"] = [SIDE, SIDE]
    if type(getattr(config, "patch_size", None)) is list or type(getattr(config, "patch_size", None)) is tuple:
        out["patch_size"] = [PATCH, PATCH]
    if 0 < (getattr(config, "initializer_range", None) or 0) < 1e-6:
        out["initializer_range"] = 0.02  # BLIP's 1e-10 makes weights that vanish in fp16
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        out["rope_parameters"] = rope | {"mrope_section": MROPE}
    return out


def _changes(model_type: str) -> Changes:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        found = common(CONFIG_MAPPING[model_type]())
    except Exception:  # a config that has no default: check.py says so
        found = {}
    return merged(found, CHANGES.get(model_type, {}))


def _cases(kind: str, names: list[str], auto: str, make: Any) -> list[Case]:
    return [Case(kind, model_type, auto, _changes(model_type), make) for model_type in names]


def images() -> list[Case]:
    """Every model type of MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING."""
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        # Llama 4 of transformers 5.24 reads it from what its language model returns, and fails without it.
        MoeCausalLMOutputWithPast.image_outputs = None
    auto = "AutoModelForImageTextToText"
    make = media.inputs_with(auto, media.IMAGES, media.IMAGE_TOKENS, "get_image_features")
    return _cases("images", list(NAMES), auto, make)


def sound() -> list[Case]:
    """What MODEL_FOR_MULTIMODAL_LM_MAPPING has besides those."""
    make = ("AutoModelForMultimodalLM", media.SOUND, media.SOUND_TOKENS, "get_audio_features")
    return _besides("sound", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", *make)


def speech() -> list[Case]:
    """What MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING has besides both."""
    make = ("AutoModelForSpeechSeq2Seq", media.SPEECH, media.SOUND_TOKENS, "get_audio_features")
    return _besides("speech", "SPEECH_SEQ_2_SEQ", "MULTIMODAL_LM", *make)


def _besides(kind: str, table: str, known: str, auto: str, *inputs: Any) -> list[Case]:
    """The families of one of transformers' tables that another one lacks."""
    from transformers.models.auto import modeling_auto as tables

    of, others = (getattr(tables, f"MODEL_FOR_{name}_MAPPING_NAMES") for name in (table, known))
    return _cases(kind, [name for name in of if name not in others], auto, media.inputs_with(auto, *inputs))


KINDS = {
    "images": Kind("Language models that read images", images),
    "sound": Kind("Language models that read sound", sound),
    "speech": Kind("Speech to text", speech),
}
