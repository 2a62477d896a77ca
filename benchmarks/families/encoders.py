"""Encoders, classifiers and encoder-decoders of text, and what their tiny configs need besides shrink.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .cases import Case, Changes, Inputs, Kind, logits, token_ids
from .shrink import SPECIAL

CLASSES = 3
# model type -> changes of its tiny config.
CHANGES: dict[str, Changes] = {}


def masked_ids(config: Any) -> Inputs:
    """Token ids of which all are read."""
    found = token_ids(config)
    return found | {"attention_mask": torch.ones_like(found["input_ids"])}


def ended_ids(config: Any) -> Inputs:
    """The same, each row with the end of a text as its last token."""
    found = masked_ids(config)
    found["input_ids"][:, -1] = SPECIAL["eos_token_id"]
    return found


def pair(config: Any) -> Inputs:
    """Token ids for an encoder, and some for its decoder."""
    found = masked_ids(config)
    return found | {"decoder_input_ids": found["input_ids"][:, :5].flip(0)}


def hidden(output: Any) -> torch.Tensor:
    """What a model without a head gives."""
    found: torch.Tensor = output.last_hidden_state
    return found


def predictions(output: Any) -> torch.Tensor:
    """Logits under either of their names."""
    found = getattr(output, "logits", None)
    return output.prediction_logits if found is None else found


def _cases(
    kind: str,
    names: list[str],
    auto: str,
    make: Callable[[Any], Inputs] = masked_ids,
    output: Callable[[Any], torch.Tensor] = logits,
    changes: Changes | None = None,
) -> list[Case]:
    own = changes or {}
    return [Case(kind, name, auto, own | CHANGES.get(name, {}), make, output) for name in names]


def masked() -> list[Case]:
    """MODEL_FOR_MASKED_LM_MAPPING: most of them tie their decoder to the embedding."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as NAMES

    return _cases("masked", list(NAMES), "AutoModelForMaskedLM", output=predictions)


def encoders() -> list[Case]:
    """MODEL_FOR_TEXT_ENCODING_MAPPING: encoders as such, what sentence embedders are made of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as NAMES

    return _cases("encoders", list(NAMES), "AutoModelForTextEncoding", output=hidden)


def classifiers() -> list[Case]:
    """MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    auto = "AutoModelForSequenceClassification"
    return _cases("classifiers", list(NAMES), auto, ended_ids, changes={"num_labels": CLASSES, "pad_token_id": 0})


def seq2seq() -> list[Case]:
    """What MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING has besides models that read sound or images."""
    from transformers.models.auto import modeling_auto as tables

    known = tables.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES | tables.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
    names = [name for name in tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if name not in known]
    return _cases("seq2seq", names, "AutoModelForSeq2SeqLM", pair)


KINDS = {
    "masked": Kind("Masked language models", masked),
    "encoders": Kind("Encoders", encoders),
    "classifiers": Kind("Classifiers", classifiers),
    "seq2seq": Kind("Encoders with a decoder", seq2seq),
}
