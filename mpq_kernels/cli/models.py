"""Open a model directory for the commands that run one: packed or dense, with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError, MPQError, UnsupportedError


def open_model(
    directory: Path, device: str, dtype: str, backend: str | None, activations: str = "exact", compile: bool = False
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a packed or a dense directory. Raises as `load_model`."""
    return load_model(directory, device, dtype, backend, activations, compile), _load_tokenizer(directory)


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises MPQError for another encoding, OSError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MPQError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None


def load_model(
    directory: Path, device: str, dtype: str, backend: str | None, activations: str = "exact", compile: bool = False
) -> Any:
    """The model of a packed or a dense directory, in eval mode. compile: its decode step, as of `load`.

    Raises CheckpointError for a directory that is neither, UnsupportedError for a device or backend that cannot.
    """
    from transformers.utils import logging

    from ..checkpoint.config import QUANT_METHOD
    from ..files.strict import contained_file, read_json_object

    wanted = named_dtype(dtype)
    check_device(device)
    logging.disable_progress_bar()
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is not a directory")
    config = read_json_object(contained_file(directory, "config.json"))
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        from ..hf.load import load

        model: Any = load(directory, device=device, dtype=wanted, backend=backend, activations=activations)
    elif backend is not None:
        raise UnsupportedError(f"{directory}: is a dense model, which needs no backend; leave --backend out")
    elif activations != "exact":
        raise UnsupportedError(
            f"{directory}: is a dense model, whose products are exact; --activations {activations} is for packed ones"
        )
    else:
        model = _load_dense(directory, device, wanted)
    if compile:
        from ..hf.compiled import compile_decoding

        compile_decoding(model)
    return model.eval()


def named_dtype(dtype: str) -> Any:
    """The torch.dtype that a --dtype option names, None for auto."""
    from ..dense.checkpoint import COMPUTE_DTYPES

    return None if dtype == "auto" else COMPUTE_DTYPES[dtype]


def check_device(device: str) -> None:
    """Raise UnsupportedError for a device that torch does not know or does not find."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UnsupportedError(f"device={device!r} is not one that torch {torch.__version__} knows") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"device={device!r}: torch {torch.__version__} finds no CUDA device; use --device cpu")


def _load_dense(directory: Path, device: str, dtype: Any) -> Any:
    from ..dense.checkpoint import DenseCheckpoint
    from ..dense.model import model_class

    source = DenseCheckpoint.open(directory)  # refuses pickles, truncated files and foreign quantizations in words
    model: Any = model_class(directory).from_pretrained(
        directory, dtype=dtype or source.dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    return model.to(device)


def _load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # any type, from deep inside the tokenizer libraries
        raise CheckpointError(
            f"{directory}: has no tokenizer that transformers can load ({type(error).__name__}: {str(error)[:300]}); "
            "copy the tokenizer files of the model into it"
        ) from error
