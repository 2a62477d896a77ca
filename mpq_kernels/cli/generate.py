"""`mpq generate`: continue a prompt, or answer it about images and sound, printing the text as it comes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .media import media_inputs, open_processor
from .models import load_model, open_model
from .options import (
    ActivationsOption,
    AnyDir,
    BackendOption,
    CompileFlag,
    DeviceOption,
    DtypeOption,
    JsonFlag,
    QuietFlag,
)
from .output import note, print_json


def command(
    directory: AnyDir,
    prompt: Annotated[str, typer.Option(help="Text to continue, or to answer about images and sound.")] = "",
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A picture that the model looks at; may be repeated.")
    ] = None,
    audio: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A sound that the model hears; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; 1 samples from the model as it is.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: DeviceOption = "cpu",
    backend: BackendOption = None,
    activations: ActivationsOption = "exact",
    dtype: DtypeOption = "auto",
    compile: CompileFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Print the prompt and its continuation by a packed or dense model, or what it says of images and sound."""
    from ..errors import MPQError

    images, sounds = image or [], audio or []
    if images or sounds:
        processor = open_processor(directory)
        tokenizer, inputs = processor.tokenizer, media_inputs(processor, prompt, images, sounds)
        model = load_model(directory, device, dtype, backend, activations, compile)
        inputs = inputs.to(device, dtype=model.dtype)  # of floating tensors only
    else:
        if not prompt:
            raise MPQError("the prompt is empty; give at least one word")
        model, tokenizer = open_model(directory, device, dtype, backend, activations, compile)
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
    if not model.can_generate():
        raise MPQError(f"{directory}: a {type(model).__name__} generates no text")
    reads = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]  # tokens before the first new one
    start = time.perf_counter()
    output = _generate(
        model, tokenizer, inputs, max_new_tokens, temperature, seed, None if as_json else bool(images or sounds)
    )
    seconds = time.perf_counter() - start
    new = output[0, reads:]
    if as_json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        facts = {"prompt": prompt, "text": text, "new_tokens": len(new), "token_ids": new.tolist()}
        print_json(facts | {"seconds": seconds, "tokens_per_s": len(new) / seconds})
    note(f"{len(new)} tokens in {seconds:.2f} s, {len(new) / seconds:.1f} tokens/s with the prompt", quiet or as_json)


def _generate(
    model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int, temperature: float, seed: int, answer: bool | None
) -> Any:
    """Token ids [1, prompt + new]. They are printed on stdout as they come: with `answer`, without the prompt.

    answer: None prints nothing.
    """
    import torch
    from transformers import TextStreamer

    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    # Off means absent: transformers warns about sampling settings, its own defaults too, in greedy search.
    sampling |= {
        "temperature": temperature if temperature > 0 else None,
        "top_p": None,
        "top_k": 0 if temperature else None,
    }
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    streamer = None if answer is None else TextStreamer(tokenizer, skip_prompt=answer, skip_special_tokens=True)
    return model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, streamer=streamer, **sampling)
