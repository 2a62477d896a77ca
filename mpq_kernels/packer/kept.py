"""Tensors of the source that stay as they are, and what the output calls them.

A kept tensor has the name that it has in the source, whatever the model calls it: transformers renames, splits and
merges the same tensors when it loads the output. It has the model's name where that would not do:

    one of several parameters that are made of it is packed        q packed, k and v kept, of a stored qkv
    a packed linear has the name of what it lies beside            gate.bias, which becomes gate.e_score_correction_bias
"""

from __future__ import annotations

from ..dense.checkpoint import DenseCheckpoint
from ..dense.conversions import Origin
from ..plan.resolve import ResolvedPlan


def kept_tensors(source: DenseCheckpoint, resolved: ResolvedPlan) -> dict[str, Origin]:
    """Name in the output -> where the tensor comes from, of every tensor that is not packed.

    A tied embedding stays, also where the head is packed, unless it is packed itself: it is looked up by row.
    """
    model = source.model_map
    specs = [member.spec for weight in resolved.weights for member in weight.members] + [*resolved.floats.values()]
    shared = {name for weight in resolved.weights if weight.embedding for name in weight.embedding.shared}
    modules = {spec.name if spec.expert is None else spec.expert.module for spec in specs}
    packed = {parameter for parameter in model.origins if parameter.rpartition(".")[0] in modules}
    packed |= {f"{name}.weight" for name in shared}  # a tied head keeps its bias
    owners = modules | {weight.name for weight in resolved.weights}
    kept = {name: Origin((name,), tensor.shape, tensor.dtype) for name, tensor in source.tensors.items()}
    fed: dict[str, list[str]] = {}
    for parameter, origin in model.origins.items():
        for name in origin.tensors:
            fed.setdefault(name, []).append(parameter)
    for name, parameters in fed.items():
        left = [parameter for parameter in parameters if parameter not in packed]
        apart = len(left) < len(parameters) and model.origins[parameters[0]].conversion is not None
        beside = name.rpartition(".")[0] in owners
        if not left or apart or (beside and name not in left):
            del kept[name]
        if apart or (left and beside and name not in left):
            kept |= {parameter: model.origins[parameter] for parameter in left}
    looked_up = {spec.tensor for spec in specs if spec.embedding}
    if model.tied_source in looked_up:
        return kept
    if model.tied_target is not None and model.tied_target not in kept:  # it is stored as the head's alone
        origin = model.origins[model.tied_target]
        kept = {name: other for name, other in kept.items() if name not in origin.tensors}
        kept[model.tied_target] = origin
    return kept
