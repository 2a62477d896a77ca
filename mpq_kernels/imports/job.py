"""The packer's job with codes that exist already: parts, journal, resume and files are the packer's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..dense.linears import LinearSpec
from ..errors import CheckpointError, PlanError
from ..format.weights import QuantizedWeight
from ..packer.job import PackJob
from ..packer.parts import digest
from ..plan.plan import FusePlan
from ..plan.resolve import ResolvedMember, ResolvedPlan, ResolvedWeight, group_members
from ..progress import Progress
from .source import ForeignCheckpoint
from .weight import ForeignTensor, ForeignWeight

DENSE = "not quantized in the source"


class ImportJob(PackJob):
    """One import: a packing whose codes are read, not made."""

    source: ForeignCheckpoint

    def __init__(self, source: ForeignCheckpoint, resolved: ResolvedPlan, progress: Progress | None) -> None:
        super().__init__(source, resolved, f"imported from {source.format}", progress)

    def _codes(self, member: ResolvedMember) -> tuple[QuantizedWeight, dict[str, str], float, int]:
        weight = _foreign(self.source, member.spec)
        assert weight is not None
        quantized, inputs = weight.read(self.source.files), self._digests(member.spec)
        weight.release(self.source.files)
        return quantized, inputs, 0.0, 0

    def _digests(self, spec: LinearSpec, dense: torch.Tensor | None = None) -> dict[str, str]:
        weight = _foreign(self.source, spec)
        if weight is None:
            return super()._digests(spec, dense)
        out = {spec.tensor: digest(weight.stored(self.source.files))}
        bias = self.source.bias(spec)
        if bias is not None and spec.bias_tensor is not None:
            out[spec.bias_tensor] = digest([bias])
        return out


# Linears of one module that read the same input, in most decoders.
FUSED = (
    FusePlan(name="qkv_proj", members=("q_proj", "k_proj", "v_proj")),
    FusePlan(name="gate_up_proj", members=("gate_proj", "up_proj")),
)


def prepare_import(source: ForeignCheckpoint, fuse: bool = False) -> tuple[ResolvedPlan, list[str]]:
    """(the layout of every quantized weight, and what is kept and why; notes). Raises CheckpointError.

    fuse: make one packed weight of each of FUSED, where all of its members in the model agree; a note says where not.
    """
    specs = {spec.name: spec for spec in source.packable()}
    members: dict[str, ResolvedMember] = {}
    kept: dict[str, str] = {}
    for name, spec in specs.items():
        weight = _foreign(source, spec)
        if weight is not None:
            members[name] = ResolvedMember(spec, weight.layout)
        elif not spec.embedding:
            kept[name] = DENSE
    _check_experts(source, members, kept)
    rules: tuple[FusePlan, ...] = ()
    notes: list[str] = []
    resolved = _grouped(source, specs, members, kept, rules)
    for rule in FUSED if fuse else ():
        try:
            resolved = _grouped(source, specs, members, kept, (*rules, rule))
        except CheckpointError as error:
            notes.append(f"not fused into {rule.name}: {error}")
            continue
        rules = (*rules, rule)
    return resolved, notes


def _grouped(
    source: ForeignCheckpoint,
    specs: Mapping[str, LinearSpec],
    members: Mapping[str, ResolvedMember],
    kept: Mapping[str, str],
    rules: Sequence[FusePlan],
) -> ResolvedPlan:
    try:
        resolved = group_members(specs, dict(members), dict(kept), {}, rules)
    except PlanError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    for packed in resolved.weights:
        _check_order(source, packed)
    return resolved


def taken(source: ForeignCheckpoint, resolved: ResolvedPlan) -> dict[str, str]:
    """Linear -> how its weight is stored in the source."""
    out = {}
    for packed in resolved.weights:
        for member in packed.members:
            weight = _foreign(source, member.spec)
            out[member.spec.name] = "" if weight is None else weight.says
    return out


def _foreign(source: ForeignCheckpoint, spec: LinearSpec) -> ForeignWeight | None:
    """The quantized weight that is the weight of a linear; None where it is dense. Raises CheckpointError."""
    tensor = source.tensors[spec.tensor]
    if spec.tensor in source.experts:
        return source.experts[spec.tensor](spec)
    if not isinstance(tensor, ForeignTensor):
        return None
    if spec.origin is not None:
        raise CheckpointError(
            f"{tensor.parts[0]}: transformers makes {spec.name} of several stored weights, or of a part of one; "
            "that is not done with codes"
        )
    return tensor.weight


def _check_experts(source: ForeignCheckpoint, members: Mapping[str, ResolvedMember], kept: Mapping[str, str]) -> None:
    blocks: dict[str, list[str]] = {}
    for spec in source.linears():
        if spec.expert is not None:
            blocks.setdefault(spec.expert.block, []).append(spec.name)
    for block, names in blocks.items():
        dense = [name for name in names if name in kept]
        if dense and len(dense) < len(names):
            raise CheckpointError(
                f"{source.path}: {len(dense)} of the {len(names)} linears of {block} are not quantized, such as "
                f"{dense[0]}, and the experts of one module are packed together"
            )


def _check_order(source: ForeignCheckpoint, packed: ResolvedWeight) -> None:
    """Raise CheckpointError where members that are packed together have other orders of their columns."""
    weights = [(member.spec.name, _foreign(source, member.spec)) for member in packed.members]
    orders = {weight.columns.order: name for name, weight in weights if weight is not None}
    if len(orders) > 1:
        one, other = [*orders.values()][:2]
        raise CheckpointError(
            f"{source.path}: {one} and {other} are packed together as {packed.name}, and were quantized with columns "
            "in other orders (act-order, desc_act): one order of the columns is stored for all"
        )
