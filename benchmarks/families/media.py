"""Inputs with images or sound for a tiny model of any family: forms are tried in turn until one reaches the logits.

A form is what a family's processor makes of a picture. How many tokens it takes is asked of the model itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .cases import Inputs, copies, logits

Form = Callable[[Any], Inputs]  # config -> what stands for one picture, or one sound
IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "im_patch_id")
SOUND_TOKENS = ("audio_token_id", "audio_token_index")
ROWS = "rows"  # of features that a form makes, where the model has no method that says it
TEXT_BEFORE, TEXT_BEHIND = [11, 23], [17, 42, 35, 12]
SIDE = 32  # pixels, where a config says nothing


def inputs_with(auto: str, forms: dict[str, Form], tokens: tuple[str, ...], features: str) -> Callable[[Any], Inputs]:
    """What makes the inputs of a family, out of its config: the first form whose values change the logits.

    auto: class of transformers that makes the model. tokens: names under which configs have the id of the token that
    stands for a part of a picture. features: method of the model that turns a picture into what replaces those.
    """

    def make(config: Any) -> Inputs:
        import transformers

        model = getattr(transformers, auto).from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():  # a gate or a projection that begins as zero
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
        problems = []
        for name, form in forms.items():
            try:
                inputs = _with_tokens(model, form(config), tokens, features)
                other = {
                    key: torch.randn_like(value) if value.is_floating_point() else value
                    for key, value in inputs.items()
                }
                first, second = model(**copies(inputs)), model(**copies(other))
                if torch.equal(logits(first), logits(second)):
                    raise ValueError("the values do not reach the logits")
                return inputs
            except Exception as error:  # of another form than the model wants: any type
                problems.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:90]}")
        raise ValueError(f"inputs of no known form fit: {'; '.join(problems)}")

    return make


def _others(value: torch.Tensor) -> torch.Tensor:
    """Other random values in place of random values."""
    return torch.randn_like(value) if value.is_floating_point() else value


def _with_tokens(model: Any, media: Inputs, names: tuple[str, ...], features: str) -> Inputs:
    """Media inputs with token ids around as many marks as the model makes rows of them."""
    wanted, rows_of_form = inspect.signature(model.forward).parameters, media.pop(ROWS, None)
    if "input_features_mask" in wanted and "input_features" in media:
        media["input_features_mask"] = torch.ones(1, media["input_features"].shape[-1], dtype=torch.long)
    if "decoder_input_ids" in media:
        return media
    token = next((value for name in names if (value := getattr(model.config, name, None)) is not None), None)
    method = getattr(model, features, None) or getattr(model.base_model, features, None)
    rows = 0 if rows_of_form is None else int(rows_of_form)
    if token is not None and method is not None:
        rows = _rows(_called(method, media | _questions(model)))
    ids = torch.tensor([[*TEXT_BEFORE, *[token] * rows, *TEXT_BEHIND]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media, **_kinds(model, ids, token)}


def _called(method: Callable[..., Any], media: Inputs) -> Any:
    """What a method gives for those of the inputs that it takes."""
    wanted = inspect.signature(method).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in wanted.values())
    return method(**{name: value for name, value in copies(media).items() if takes_all or name in wanted})


def _kinds(model: Any, ids: torch.Tensor, token: int | None) -> Inputs:
    """Which tokens are not text, for models that want to be told."""
    wanted = inspect.signature(model.forward).parameters
    kinds = (ids == token).long() if token is not None else torch.zeros_like(ids)
    out = {name: kinds for name in ("mm_token_type_ids", "token_type_ids") if name in wanted}
    return out | _questions(model)


def _questions(model: Any) -> Inputs:
    """What a model asks its own projector about a picture."""
    wanted = inspect.signature(model.forward).parameters
    return {"qformer_input_ids": torch.tensor([TEXT_BEHIND])} if "qformer_input_ids" in wanted else {}


def _rows(found: Any) -> int:
    """Rows of features in what a model's method gives: a tensor, several, or an output that holds them."""
    for name in ("pooler_output", "image_embeds", "last_hidden_state"):
        if getattr(found, name, None) is not None:
            return _rows(getattr(found, name))
    if isinstance(found, list | tuple):
        return sum(_rows(each) for each in found if isinstance(each, torch.Tensor))
    return int(found.numel() // found.shape[-1])


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config


def _side(config: Any) -> int:
    side = getattr(_vision(config), "image_size", None) or SIDE
    return int(side if isinstance(side, int) else side[0] if isinstance(side, list | tuple) else SIDE)


def square(config: Any) -> Inputs:
    """[1, 3, side, side]"""
    return {"pixel_values": _random(1, 3, _side(config), _side(config))}


def sized(config: Any) -> Inputs:
    """A picture with its size beside it."""
    return square(config) | {"image_sizes": torch.tensor([[_side(config), _side(config)]])}


def tiles(config: Any) -> Inputs:
    """[1, 1, 3, side, side]: one tile of one picture"""
    return {"pixel_values": square(config)["pixel_values"][None]}


def sized_tiles(config: Any) -> Inputs:
    """A picture whole and in one tile, as LLaVA-NeXT cuts it."""
    side = _side(config)
    return {"pixel_values": _random(1, 3, 3, side, side), "image_sizes": torch.tensor([[side, 2 * side]])}


def patches(config: Any) -> Inputs:
    """Rows of patches with their grid, as Qwen2-VL has them."""
    vision = _vision(config)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    row = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    side = 2 * (getattr(vision, "spatial_merge_size", None) or 2)
    return {"pixel_values": _random(side * side, row), "image_grid_thw": torch.tensor([[1, side, side]])}


def placed_patches(config: Any) -> Inputs:
    """[1, patches, pixels] with the place of each, as Gemma 4 has them."""
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    return {"pixel_values": _random(1, 16, 3 * _vision(config).patch_size ** 2), "image_position_ids": places}


def shaped_patches(config: Any) -> Inputs:
    """[1, patches, pixels] with the shape of their grid, as LFM2-VL has them."""
    pixels = _random(1, 16, 3 * _vision(config).patch_size ** 2)
    mask = torch.ones(1, 16, dtype=torch.long)
    return {"pixel_values": pixels, "spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": mask}


def small_pictures(config: Any) -> Inputs:
    """[patches, 3, side, side] with their grid, as Kimi has them."""
    side = _vision(config).patch_size
    return {"pixel_values": _random(16, 3, side, side), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def crossed(config: Any) -> Inputs:
    """Tiles that layers of their own attend to, as Llama 3.2 does."""
    side, tiles = _side(config), _vision(config).max_num_tiles
    tokens = len(TEXT_BEFORE) + len(TEXT_BEHIND)
    return {
        "pixel_values": _random(1, 1, tiles, 3, side, side),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, tokens, 1, tiles, dtype=torch.long),
    }


def decoded(config: Any) -> Inputs:
    """A picture for a model that decodes what it sees."""
    return square(config) | {"decoder_input_ids": torch.tensor([[1, *TEXT_BEHIND]])}


IMAGES: dict[str, Form] = {
    "square": square,
    "patches": patches,
    "tiles": tiles,
    "sized": sized,
    "sized tiles": sized_tiles,
    "placed patches": placed_patches,
    "shaped patches": shaped_patches,
    "small pictures": small_pictures,
    "crossed": crossed,
    "decoded": decoded,
}


def _bins(config: Any) -> int:
    part = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    return int(getattr(part, "num_mel_bins", None) or getattr(part, "input_dim", None) or 80)


def spectrum(config: Any) -> Inputs:
    """[1, bins, frames] for the number of frames that the encoder has positions for."""
    part = getattr(config, "audio_config", None) or config
    frames = 2 * (getattr(part, "max_source_positions", None) or 50)
    return {"input_features": _random(1, _bins(config), frames)}


def masked_spectrum(config: Any) -> Inputs:
    """The same with a mask of frames, of which four make a row, as in Qwen2-Audio."""
    features = spectrum(config)["input_features"]
    mask = torch.ones(1, features.shape[2], dtype=torch.long)
    return {"input_features": features, "feature_attention_mask": mask, ROWS: mask.sum() // 4}


def frames(config: Any) -> Inputs:
    """[1, frames, bins]"""
    return {"input_features": _random(1, 64, _bins(config))}


def waveform(config: Any) -> Inputs:
    """[1, samples]"""
    del config
    return {"input_values": _random(1, 4000)}


def _decoded(form: Form) -> Form:
    """A form for a model that decodes what it hears: the tokens so far beside it."""
    return lambda config: form(config) | {"decoder_input_ids": torch.tensor([[1, *TEXT_BEHIND]])}


SOUND: dict[str, Form] = {
    "spectrum": spectrum, "masked spectrum": masked_spectrum, "frames": frames, "waveform": waveform,
}  # fmt: skip
SPEECH: dict[str, Form] = {name: _decoded(form) for name, form in SOUND.items()}
