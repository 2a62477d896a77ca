"""`load`, of packed directories and of those that other programs quantized: these are imported first."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.config import QUANT_METHOD
from ..dense.checkpoint import CONFIG_FILE
from ..errors import CheckpointError
from ..files.strict import read_json_object
from ..hf.load import load as load_packed

if TYPE_CHECKING:
    import torch


def load(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    activations: str = "exact",
    import_to: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """The model of a packed directory, in evaluation mode, on `device` (the CPU without one).

    A directory that another program quantized is imported first, and a warning says so: into the new directory
    `import_to`, or for a quick look into a temporary one, whose files are removed as soon as they are loaded.

    Its class is the one that config.json names (`architectures`), else the one that transformers has for its type.
    dtype: of everything that is not packed; None is the checkpoint's own. backend: a name from backends.BACKENDS; None
    takes the first that serves the device. activations: "exact", or "int8" for the fast mode of the CPU, which rounds
    the inputs of packed layers for each token and group. options: further keywords of `from_pretrained`, such as
    attn_implementation, device_map (instead of a device) and max_memory. Files are mapped; on the CPU packed tensors
    are used where they lie.

    Raises CheckpointError for anything missing, misshapen or of an unknown version, and for what cannot be imported
    exactly; UnsupportedError when no backend serves the device with such activations and for options that are decided
    here or that nobody knows.
    """
    how: dict[str, Any] = {"dtype": dtype, "backend": backend, "activations": activations, **options}
    form = _foreign(Path(path))
    if form is None:
        if import_to is not None:
            raise CheckpointError(f"{path}: import_to={str(import_to)!r}: there is nothing to import in it")
        return load_packed(path, device, **how)
    from .convert import import_checkpoint  # brings the packer, which packed directories do not need

    where = "a temporary directory" if import_to is None else str(import_to)
    warnings.warn(f"{path} is a {form} checkpoint; it is imported into {where} before it is loaded", stacklevel=2)
    if import_to is not None:
        import_checkpoint(path, import_to)
        return load_packed(import_to, device, **how)
    with tempfile.TemporaryDirectory() as folder:  # what is mapped stays when its file is removed
        import_checkpoint(path, Path(folder) / "packed")
        return load_packed(Path(folder) / "packed", device, **how)


def _foreign(path: Path) -> str | None:
    """The format of a directory that can be imported; None for any other, of which loading says what is wrong."""
    try:
        said = read_json_object(path / CONFIG_FILE).get("quantization_config")
        if isinstance(said, dict) and said.get("quant_method") == QUANT_METHOD:
            return None
        from .formats import find_format
        from .stored import Stored

        return find_format(Stored.open(path))
    except CheckpointError:
        return None
