"""What packing did, in numbers that are recomputed from the packed tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..dense.checkpoint import DenseCheckpoint
from ..dense.conversions import Origin
from ..dense.experts import PARAMETERS
from ..dense.kinds import SCALED_EMBEDDING
from ..dense.linears import DOWN, GATE_UP, PARTS
from ..format.layout import SizeBreakdown
from ..plan.resolve import ResolvedPlan

LARGE = 1_000_000  # elements above which a parameter that is not packed is named


@dataclass(frozen=True)
class ModuleReport:
    """One packed module.

    members: names of the dense modules in it. bits: mean width of its codes. bpw: stored bits for each weight.
    bytes: as stored, without the bias. errors: member -> ||W - dequantized W|| / ||W|| (Frobenius).
    """

    name: str
    members: tuple[str, ...]
    bits: float
    bpw: float
    bytes: int
    errors: dict[str, float]


@dataclass(frozen=True)
class LargeParameter:
    """A parameter of the model that was not packed. Experts count together, as transformers holds them."""

    name: str
    elements: int
    reason: str


@dataclass(frozen=True)
class PackReport:
    """What `pack` wrote.

    packed: all packed weights by purpose. kept: dense module -> why it was kept. kept_bytes: tensors that belong to no
    packed module. bias_bytes: biases of packed modules. file_bytes: safetensors files with headers.
    source_bytes: tensors of the dense checkpoint. copied: files carried along, relative to out_dir. left: file, or
    folder with "/" behind it -> why it was not. unused: tensors that were kept and that the model does not use.
    decoded: tensors that were kept, and that the source stores in fp8 or mxfp4: they take 16 bits now.
    large: every parameter of more than LARGE elements that was not packed, and why. resumed: how many of `parts`, the
    linears that were packed and the tensors that were kept, an earlier run had finished. unreached: experts that no
    calibration token was routed to; they were calibrated on all tokens that their module reads. zero_groups: packed
    linear -> how many of its groups are stored as zeros, because all of their weights are 0, or so small that their
    scale is 0 in its dtype; linears without any are not in it.
    """

    out_dir: str
    quantizer: str
    modules: tuple[ModuleReport, ...]
    kept: dict[str, str]
    packed: SizeBreakdown
    kept_bytes: int
    bias_bytes: int
    file_bytes: int
    source_bytes: int
    files: tuple[str, ...]
    copied: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    decoded: tuple[str, ...] = ()
    large: tuple[LargeParameter, ...] = ()
    parts: int = 0
    resumed: int = 0
    unreached: tuple[str, ...] = ()
    zero_groups: dict[str, int] = field(default_factory=dict)

    @property
    def bpw(self) -> float:
        """Stored bits for each packed weight, everything included."""
        return self.packed.bits_per_weight

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the totals."""
        data = asdict(self)
        data["packed"] |= {"total_bytes": self.packed.total_bytes, "bpw": self.bpw}
        return data


def large_parameters(
    source: DenseCheckpoint, resolved: ResolvedPlan, kept: Mapping[str, Origin]
) -> tuple[LargeParameter, ...]:
    """Parameters of more than LARGE elements that stay as they are. kept: name in the output -> where it comes from."""
    sizes: dict[str, int] = {}
    reasons: dict[str, str] = {}
    model = source.model_map
    named = {name for part in model.left.values() for name in part.tensors}
    for name, part in model.left.items():
        sizes[name], reasons[name] = part.elements, part.reason
    for spec in model.linears:
        if spec.name not in resolved.kept:
            continue
        name = spec.tensor
        if spec.expert is not None:
            leaf = GATE_UP if spec.expert.part in PARTS[GATE_UP] else DOWN
            name = f"{spec.expert.module}.{PARAMETERS[leaf]}"
        sizes[name] = sizes.get(name, 0) + spec.out_features * spec.in_features
        reasons[name] = resolved.kept[spec.name]
        named.add(spec.tensor)
    for name, origin in kept.items():
        if origin.tensor not in named:
            sizes[name] = math.prod(origin.shape)
            reasons[name] = _why_not_linear(model.kinds.get(origin.tensor))
    return tuple(LargeParameter(name, size, reasons[name]) for name, size in sizes.items() if size > LARGE)


def _why_not_linear(kind: str | None) -> str:
    if kind is None:
        return "has another name in the model, where it is not the weight of a linear"
    if kind == "Embedding" or kind.endswith(SCALED_EMBEDDING):
        return f"is looked up by row ({kind}), and no rule names it"
    return f"{kind} is not a linear that is known here"
