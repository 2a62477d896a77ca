"""The model that a config.json describes, as transformers builds it: which class, and without memory or weights.

Code that comes with a checkpoint is never run. A config can ask for anything, so what is built from it is bounded: the
labels and modules of a model on the meta device, and before weights are loaded the bytes that it will take.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import CheckpointError, MPQError
from ..files.strict import read_json_object, short

CONFIG_FILE = "config.json"
MAX_LABELS = 100_000  # the largest classifier of images known has 21,843
MAX_MODULES = 100_000  # experts of all models but a few are parameters of one module; a module takes about 5 kB
FREE_BYTES = 256 * 2**20  # that a model may take beside its files, for buffers such as rotary tables

# transformers' tables of classes by config, in the order in which a class is looked for, and its auto class for each.
KINDS = {
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING": "AutoModelForImageTextToText",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING": "AutoModelForMultimodalLM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING": "AutoModelForSpeechSeq2Seq",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING": "AutoModelForSeq2SeqLM",
    "MODEL_FOR_CAUSAL_LM_MAPPING": "AutoModelForCausalLM",  # behind these: it also has the decoders of their models
    "MODEL_FOR_MASKED_LM_MAPPING": "AutoModelForMaskedLM",
}
BASE_KIND = {"MODEL_MAPPING": "AutoModel"}


def model_class(path: Path) -> Any:
    """The class of the model in a directory: the one that config.json names (`architectures`).

    Where transformers has no such class for this type of model, the first that it has in the tables of KINDS; and the
    causal model for a base model whose head would be its input embedding: that is a whole language model, saved without
    its head. Raises what transformers raises for a config that it refuses; see `refused_by_transformers`.
    """
    import transformers  # seconds to import, and only needed here

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    for name in config.architectures or ():
        named: Any = getattr(transformers, name, None) if isinstance(name, str) else None
        known = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
        if known and named.config_class is type(config):
            causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
            return named if causal is None or not _lacks_only_a_tied_head(named, causal, config) else causal
    # A base model has nothing of a head that config.json names.
    for table, auto in (KINDS if config.architectures else KINDS | BASE_KIND).items():
        found = getattr(transformers, table, {}).get(type(config), None)
        if found is not None and not isinstance(found, list | tuple):
            # A class of another type of config would read config.json as one of its own; the auto class does not.
            return found if found.config_class is type(config) else getattr(transformers, auto)
    return transformers.AutoModelForCausalLM  # which says that it knows no such model


def _lacks_only_a_tied_head(named: Any, causal: Any, config: Any) -> bool:
    """Whether a class is the base model of the causal one, which adds no parameters but tied ones."""
    if named is causal or named not in _base_classes(config) or causal.config_class is not type(config):
        return False
    with torch.device("meta"):
        model = causal._from_config(config)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    added = {name for name in names if not name.startswith(f"{causal.base_model_prefix}.")}
    return bool(added) and added <= set(model.all_tied_weights_keys)


def _base_classes(config: Any) -> tuple[Any, ...]:
    """What AutoModel makes of a config."""
    from transformers import MODEL_MAPPING

    found = MODEL_MAPPING.get(type(config), None) or ()
    return tuple(found) if isinstance(found, list | tuple) else (found,)


def build_meta_model(path: Path, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The model that config.json describes, of `model_class`, without memory or weights.

    dtype: of its parameters, None for config.json's. Raises CheckpointError when transformers does not know the model
    type or refuses the config.
    """
    from transformers import AutoConfig

    with refused_by_transformers(path):
        named = model_class(path)
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        make = named._from_config if hasattr(named, "_from_config") else named.from_config
        with torch.device("meta"):
            model: torch.nn.Module = make(config, **({} if dtype is None else {"dtype": dtype}))
    return model


@contextmanager
def refused_by_transformers(path: Path) -> Iterator[None]:
    """For a block that builds or loads the model of a directory: CheckpointError for whatever transformers raises.

    A malformed config surfaces as any type. Raises CheckpointError too for a model of absurdly many labels or modules,
    before they take memory.
    """
    _check_labels(path / CONFIG_FILE)
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise CheckpointError(f"{path / CONFIG_FILE}: describes a model of more than {MAX_MODULES} modules")

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    except MPQError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path / CONFIG_FILE}: transformers cannot build this model ({type(error).__name__}: "
            f"{short(str(error), 300)}); code that comes with a checkpoint is not run"
        ) from error
    finally:
        hook.remove()


def _check_labels(where: Path) -> None:
    """transformers makes a name for each label before it looks at anything else."""
    for part in config_parts(read_json_object(where)):
        labels = part.get("num_labels")
        if type(labels) is int and labels > MAX_LABELS:
            raise CheckpointError(f"{where}: num_labels={labels}, more than {MAX_LABELS}")


def config_parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config and all configs in it, such as that of its text model."""
    pending = [config]
    while pending:
        part = pending.pop()
        yield part
        pending += [value for value in part.values() if isinstance(value, dict)]


def check_bytes(where: Path, model: torch.nn.Module, stored: int) -> None:
    """Raise CheckpointError when a model on the meta device would take far more memory than its files' `stored` bytes.

    Parameters that the files lack or hold in another shape are made before transformers reports them, and buffers are
    computed. A parameter takes at most four times its stored bytes: fp8 loaded as fp32.
    """
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    for what, size, limit in (("parameters", parameters, 4 * stored), ("buffers", buffers, stored)):
        if size > limit + FREE_BYTES:
            raise CheckpointError(
                f"{where}: the model that it describes has {size} bytes of {what}, and its files hold {stored} bytes: "
                "is it of another model?"
            )


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Without transformers' bar of loaded weights, which would be shown for every block, or though nothing is read."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
