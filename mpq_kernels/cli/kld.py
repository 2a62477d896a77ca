"""`mpq kld`: how far a model's predictions on a text are from those of the original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import MPQError
from .models import load_model, open_model, read_text
from .options import ActivationsOption, AnyDir, BackendOption, DeviceOption, DtypeOption, JsonFlag, QuietFlag
from .output import note, print_json, progress


def command(
    directory: AnyDir,
    original: Annotated[
        Path, typer.Option(metavar="MODEL|FILE", help="Dense directory of the original, or a file written by --save.")
    ],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text file; not needed with a file of --save.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Use only the first so many tokens.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Log-probabilities of the original that are compared.")] = 512,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the original's predictions, for the next comparison.")
    ] = None,
    device: DeviceOption = "cpu",
    backend: BackendOption = None,
    activations: ActivationsOption = "exact",
    dtype: DtypeOption = "float32",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """KL divergence to the original, token by token: mean, percentiles, agreement on the most likely token."""
    from ..evaluate.divergence import Predictions, divergence, predict
    from ..evaluate.perplexity import token_windows

    if original.is_dir():
        if text is None:
            raise MPQError(f"{original}: is a model, so there must be a text to compare on (--text FILE)")
        dense, tokenizer = open_model(original, device, dtype, None)
        rows = token_windows(tokenizer, read_text(text), window, max_tokens)
        held = predict(dense, rows, top_k)
        del dense
        if save is not None:
            held.to_file(save)
            note(f"wrote {save}", quiet)
    else:
        if text is not None or save is not None:
            raise MPQError(f"{original}: holds its own tokens; leave --text and --save out")
        held = Predictions.from_file(original)
    model = load_model(directory, device, dtype, backend, activations)
    with progress("divergence", hidden=as_json or quiet) as report:
        found = divergence(model, held, progress=report)
    if as_json:
        print_json({"path": str(directory), "original": str(original), **found.to_dict()})
        return
    print(f"KL {found.kl:.5f} +- {found.stderr:.5f} nats a token, {found.predicted:,} tokens, {found.seconds:.1f} s")
    print(f"same most likely token: {found.top1:.2%}; perplexity {found.ppl:.4f}, original {found.original_ppl:.4f}")
    print("percentiles of KL: " + ", ".join(f"{p}%: {value:.4g}" for p, value in found.percentiles.items()))
