"""Names of a packed checkpoint in the model that is being built: the base model alone, or the base model under a head.

    stored, or in quantization_config      AutoModelForCausalLM       AutoModel
    model.layers.0.mlp.up_proj             the same                   layers.0.mlp.up_proj
    layers.0.mlp.up_proj                   model.layers.0.mlp...      the same
    lm_head                                the same                   left out, and said

The tensors follow: nn/naming.py.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from torch import nn

from ..checkpoint.config import Float8Module, PackedModule, PackingConfig
from ..errors import CheckpointError
from ..format.layout import Embedding


def fit_names(packing: PackingConfig, model: nn.Module) -> tuple[PackingConfig, dict[str, PackedModule | Float8Module]]:
    """(the packing with the model's names, name in the checkpoint -> packed module with its name in the model).

    A module that lies outside of the base model is left out when the model is that base model, or of another class than
    config.json names. Names that fit nowhere else stay, for the caller to refuse. Raises CheckpointError when two
    modules get one name.
    """
    known, prefix = dict(model.named_modules()), getattr(model, "base_model_prefix", "")
    modules: dict[str, PackedModule] = {}
    stored: dict[str, PackedModule | Float8Module] = {}
    for name, module in packing.modules.items():
        fitted = next((m for m in _candidates(module, prefix) if all(place in known for place in _places(m))), module)
        if fitted is module and _may_leave_out(module, model, prefix, known):
            continue
        if fitted.name in modules:
            raise CheckpointError(f"{name}, and with another prefix, is the same module of a {type(model).__name__}")
        if fitted.embedding is not None:  # users that this class of the model lacks are left out: the head
            users = (next((c for c in _spellings(user, prefix) if c in known), None) for user in fitted.shared)
            fitted = replace(fitted, embedding=Embedding(tuple(user for user in users if user is not None)))
        modules[fitted.name], stored[name] = fitted, fitted
    floats: dict[str, Float8Module] = {}
    for name, float8 in packing.floats.items():
        fitted_name = next((c for c in _spellings(name, prefix) if c in known), name)
        if fitted_name not in known and _is_other_head(name, model, prefix):
            continue
        floats[fitted_name] = stored[name] = replace(float8, name=fitted_name)
    if modules == packing.modules and floats == packing.floats:
        return packing, stored
    kept = {next((c for c in _spellings(name, prefix) if c in known), name): why for name, why in packing.kept.items()}
    return replace(packing, modules=modules, kept=kept, floats=floats), stored


def _spellings(name: str, prefix: str) -> list[str]:
    """The name, and with the base model's prefix removed or added."""
    return [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"] if prefix else [name]


def _candidates(module: PackedModule, prefix: str) -> list[PackedModule]:
    names = _spellings(module.name, prefix)
    if module.experts is None:
        return [module, *(replace(module, name=name) for name in names[1:])]
    blocks = _spellings(module.experts.module, prefix)
    pairs = zip(names[1:], blocks[1:], strict=True)
    return [module, *(replace(module, name=n, experts=replace(module.experts, module=b)) for n, b in pairs)]


def _places(module: PackedModule) -> list[str]:
    """Modules of the dense model that a packed one stands for."""
    return module.replaced() if module.experts is None else [module.experts.module]


def _may_leave_out(module: PackedModule, model: nn.Module, prefix: str, known: Container[str]) -> bool:
    """Whether a packed module that the model lacks may be missing there: the head of another class."""
    return not all(place in known for place in _places(module)) and _is_other_head(module.name, model, prefix)


def _is_other_head(name: str, model: nn.Module, prefix: str) -> bool:
    """Whether a module lies outside of the base model, and the model is that or of another class than config.json's."""
    base = getattr(model, prefix, model) if prefix else model
    inside = name.startswith(f"{prefix}.") or name.partition(".")[0] in base._modules
    named = getattr(getattr(model, "config", None), "architectures", None) or ()
    return not inside and (base is model or type(model).__name__ not in named)
