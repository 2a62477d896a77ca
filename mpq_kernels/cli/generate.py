"""`mpq generate`: continue a prompt, printing the text as it comes."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from .models import open_model
from .options import ActivationsOption, AnyDir, BackendOption, DeviceOption, DtypeOption, JsonFlag, QuietFlag
from .output import note, print_json


def command(
    directory: AnyDir,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; 1 samples from the model as it is.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: DeviceOption = "cpu",
    backend: BackendOption = None,
    activations: ActivationsOption = "exact",
    dtype: DtypeOption = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Print the prompt and its continuation by a packed or dense model. Speed goes to stderr."""
    from ..errors import MPQError

    if not prompt:
        raise MPQError("the prompt is empty; give at least one word")
    model, tokenizer = open_model(directory, device, dtype, backend, activations)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    start = time.perf_counter()
    output = _generate(model, tokenizer, inputs, max_new_tokens, temperature, seed, stream=not as_json)
    seconds = time.perf_counter() - start
    new = output[0, inputs["input_ids"].shape[1] :]
    if as_json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        facts = {"prompt": prompt, "text": text, "new_tokens": len(new), "token_ids": new.tolist()}
        print_json(facts | {"seconds": seconds, "tokens_per_s": len(new) / seconds})
    note(f"{len(new)} tokens in {seconds:.2f} s, {len(new) / seconds:.1f} tokens/s with the prompt", quiet or as_json)


def _generate(
    model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int, temperature: float, seed: int, stream: bool
) -> Any:
    """Token ids [1, prompt + new]; with `stream`, the text is printed on stdout as it is decoded."""
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
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    return model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, streamer=streamer, **sampling)
