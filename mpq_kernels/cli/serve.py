"""`mpq serve`: transformers' own server, which speaks OpenAI's HTTP interface, around one packed or dense model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .models import load_model
from .options import ActivationsOption, AnyDir, BackendOption, CompileFlag, DeviceOption, DtypeOption, QuietFlag
from .output import note

NEEDED = ("fastapi", "uvicorn", "openai")
INSTALL = "pip install 'mpq_kernels[serve]'"
# Of one request: the server lets an answer have 1024 tokens where a request names no limit.
COMPILED_TOKENS = 2048
# Of all requests together, on the CPU, where transformers would take most of the machine's memory.
BATCHED_TOKENS = 16384
PAGE = 256  # tokens in a block of transformers' paged cache


def command(
    directory: AnyDir,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of them.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching", help="Requests join a running batch, over a paged cache.")
    ] = False,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=PAGE,
            help="Tokens that the cache of keys and values holds: with --compile of one request, with "
            "--continuous-batching of all together.",
        ),
    ] = None,
    device: DeviceOption = "cpu",
    backend: BackendOption = None,
    activations: ActivationsOption = "exact",
    dtype: DtypeOption = "auto",
    compile: CompileFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Serve a packed or dense model over HTTP: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models."""
    from ..errors import UnsupportedError

    if compile and continuous_batching:
        raise typer.BadParameter("give --compile or --continuous-batching: batches that change are not compiled")
    if cache_tokens is not None and not (compile or continuous_batching):
        raise typer.BadParameter("--cache-tokens goes with --compile or --continuous-batching: else a cache just grows")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"mpq serve needs {', '.join(missing)}: {INSTALL}")
    model = load_model(directory, device, dtype, backend, activations)
    if compile:
        from ..hf.compiled import compile_decoding

        compile_decoding(model, cache_tokens or COMPILED_TOKENS)
    note(f"{directory}: http://{host}:{port}/v1, model {str(directory)!r}", quiet)
    paged = _paged(cache_tokens, model.device.type) if continuous_batching else {}
    _serve(model, directory, host=host, port=port, continuous_batching=continuous_batching, **paged)


def _paged(cache_tokens: int | None, device: str) -> dict[str, int]:
    """Sizes of the paged cache as transformers' server takes them; none on a GPU, whose free memory it measures."""
    if cache_tokens is None and device != "cpu":
        return {}
    tokens = cache_tokens or BATCHED_TOKENS
    return {"cb_num_blocks": -(-tokens // PAGE), "cb_max_batch_tokens": min(tokens, 2048)}


def _serve(model: Any, directory: Path, **options: Any) -> None:
    """Run the server until it is stopped. Its own loading gives way to a model that is loaded, and checked, already."""
    import transformers
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import ModelManager

    from ..errors import UnsupportedError

    name = "_load_model"
    own = getattr(ModelManager, name, None)
    if own is None:
        raise UnsupportedError(f"the server of transformers {transformers.__version__} is not one that mpq serve knows")
    setattr(ModelManager, name, lambda *args, **words: model)
    try:
        Serve(force_model=str(directory), device=str(model.device), **options)
    finally:
        setattr(ModelManager, name, own)
