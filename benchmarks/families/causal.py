"""The causal families: all that transformers has as a language model, and what some of them need besides shrink.py."""

from __future__ import annotations

from .cases import Case, Changes, Kind

# model type -> changes of its tiny config.
CHANGES: dict[str, Changes] = {}


def cases() -> list[Case]:
    """Every model type of MODEL_FOR_CAUSAL_LM_MAPPING."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [
        Case("causal", model_type, "AutoModelForCausalLM", CHANGES.get(model_type, {}))
        for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ]


KIND = Kind("Causal language models", cases)
