"""`mpq ppl`: perplexity of a packed or dense model on a text file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .models import open_model, read_text
from .options import ActivationsOption, AnyDir, BackendOption, DeviceOption, DtypeOption, JsonFlag, QuietFlag
from .output import print_json, progress


def command(
    directory: AnyDir,
    text: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text file, read as one stream.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window; the first of each is context only.")] = 256,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Use only the first so many tokens.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at once.")] = 8,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens from the start of a window to that of the next; without it, a whole window."),
    ] = None,
    device: DeviceOption = "cpu",
    backend: BackendOption = None,
    activations: ActivationsOption = "exact",
    dtype: DtypeOption = "float32",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Perplexity over windows of a text, side by side unless --stride makes them overlap."""
    from ..evaluate.perplexity import perplexity

    content = read_text(text)
    model, tokenizer = open_model(directory, device, dtype, backend, activations)
    with progress("perplexity", hidden=as_json or quiet) as report:
        result = perplexity(
            model,
            tokenizer,
            content,
            window=window,
            max_tokens=max_tokens,
            batch_size=batch_size,
            stride=stride,
            progress=report,
        )
    if as_json:
        print_json({"path": str(directory), "text": str(text), "dtype": str(model.dtype), **asdict(result)})
        return
    print(
        f"perplexity {result.ppl:.4f} +- {result.stderr:.4f}  ({result.predicted:,} of {result.tokens:,} tokens "
        f"predicted, windows of {result.window}, {result.seconds:.1f} s)"
    )
