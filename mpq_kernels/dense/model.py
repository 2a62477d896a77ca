"""The model that a config.json describes, as transformers builds it: which class, and without memory or weights.

Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.strict import short

# transformers' tables of classes by config, in the order in which a class is looked for.
KINDS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",  # behind these: it also has the decoders of their models
    "MODEL_FOR_MASKED_LM_MAPPING",
)


def model_class(path: Path) -> Any:
    """The class of the model in a directory: the one that config.json names (`architectures`).

    Where transformers has no such class for this type of model, the first that it has in the tables of KINDS; and the
    causal model for a base model whose head would be its input embedding: that is a whole language model, saved without
    its head. Raises what transformers raises for a config that it refuses.
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
    for table in KINDS if config.architectures else (*KINDS, "MODEL_MAPPING"):
        found = getattr(transformers, table, {}).get(type(config), None)
        if found is not None and not isinstance(found, list | tuple):
            return found
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
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        named = model_class(path)
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        make = named.from_config if named is AutoModelForCausalLM else named._from_config
        with torch.device("meta"):
            model: torch.nn.Module = make(config, **({} if dtype is None else {"dtype": dtype}))
    except Exception as error:  # a malformed config surfaces as any type from inside transformers
        raise CheckpointError(
            f"{path / 'config.json'}: transformers cannot build this model ({type(error).__name__}: "
            f"{short(str(error), 300)}); code that comes with a checkpoint is not run"
        ) from error
    return model


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
