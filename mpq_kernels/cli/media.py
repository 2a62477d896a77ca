"""Images and sound as inputs of a model: files are read, and the model's own processor makes tensors of them.

transformers' processors need further packages: pillow for images, some of them torchvision; sound needs none where it
is a WAV file at the model's own rate.
"""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, MPQError

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
WORDS = {1: "uint8", 2: "int16", 4: "int32"}  # bytes of a sample of a WAV file -> how it is stored


def open_processor(directory: Path) -> Any:
    """What makes tensors of text, images and sound. Raises CheckpointError, MPQError where a package is missing."""
    from transformers import AutoProcessor

    try:
        found: Any = AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise MPQError(f"{directory}: its processor needs another package: {_first_lines(error)}") from error
    except Exception as error:  # any type, from deep inside of transformers
        raise CheckpointError(
            f"{directory}: has no processor that transformers can load ({type(error).__name__}: "
            f"{_first_lines(error)}); copy the processor's files of the model into it"
        ) from error
    if not hasattr(found, "tokenizer"):
        raise CheckpointError(f"{directory}: the model reads text alone; leave --image and --audio out")
    return found


def media_inputs(processor: Any, prompt: str, images: Sequence[Path], sounds: Sequence[Path]) -> Any:
    """Inputs of the model for a prompt with images and sound, by the processor's chat template where it has one.

    Raises MPQError for a file that cannot be read, and for what the processor does not take.
    """
    parts: dict[str, Any] = {}
    if images:
        if getattr(processor, "image_processor", None) is None:
            raise MPQError("the model's processor takes no images; leave --image out")
        parts["images"] = [read_image(path) for path in images]
    if sounds:
        extractor = getattr(processor, "feature_extractor", None)
        if extractor is None:
            raise MPQError("the model's processor takes no sound; leave --audio out")
        rate = extractor.sampling_rate
        parts["audio"] = [read_sound(path, rate) for path in sounds]
        parts["sampling_rate"] = rate
    try:
        return processor(**_text(processor, prompt, len(images), len(sounds)), **parts, return_tensors="pt")
    except ImportError as error:
        raise MPQError(f"the model's processor needs another package: {_first_lines(error)}") from error


def _text(processor: Any, prompt: str, images: int, sounds: int) -> dict[str, str]:
    """What the processor is told of the prompt: nothing where it is empty, as for a model that writes down speech."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * images + [{"type": "audio"}] * sounds
        message = {"role": "user", "content": [*content, {"type": "text", "text": prompt}]}
        return {"text": processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)}
    marks = [getattr(processor, "image_token", None) or ""] * images
    marks += [getattr(processor, "audio_token", None) or ""] * sounds
    text = "".join(mark for mark in marks if mark not in prompt) + prompt
    return {"text": text} if text else {}


def pictures(folder: Path) -> list[Path]:
    """The picture files of a folder, by name. Raises MPQError where there is none."""
    if not folder.is_dir():
        raise MPQError(f"{folder}: is not a directory")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not found:
        raise MPQError(f"{folder}: holds no file with one of the endings {', '.join(PICTURES)}")
    return found


def read_image(path: Path) -> Any:
    """A picture in RGB. Raises MPQError."""
    try:
        from PIL import Image
    except ImportError:
        raise MPQError("images are read with pillow, which is not installed: pip install pillow") from None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise MPQError(f"{path}: is no image that pillow can read ({error})") from error


def read_sound(path: Path, rate: int) -> Any:
    """Samples of one channel at `rate` Hz, float32 in [-1, 1]. Raises MPQError."""
    import numpy as np

    try:
        with wave.open(str(path), "rb") as file:
            found, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError):
        return _load_audio(path, rate)
    except OSError as error:
        raise MPQError(f"{path}: cannot be read ({error.strerror or error})") from error
    if found != rate or width not in WORDS:
        return _load_audio(path, rate)
    samples = np.frombuffer(data, WORDS[width]).astype(np.float32).reshape(-1, channels).mean(1)
    return (samples - 128) / 128 if width == 1 else samples / 2.0 ** (8 * width - 1)


def _load_audio(path: Path, rate: int) -> Any:
    """Any format at any rate, by transformers, which needs packages for that."""
    from transformers.audio_utils import load_audio

    try:
        return load_audio(str(path), sampling_rate=rate)
    except Exception as error:  # of many libraries
        raise MPQError(
            f"{path}: is no WAV file of 8, 16 or 32 bits at {rate} Hz, and others need more ({type(error).__name__}: "
            f"{_first_lines(error)}); convert it, as `ffmpeg -i {path.name} -ar {rate} -ac 1 out.wav` does, or "
            "pip install soundfile soxr"
        ) from error


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
