"""What packing did, in numbers that are recomputed from the packed tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .layout import SizeBreakdown


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
class PackReport:
    """What `pack` wrote.

    packed: all packed weights by purpose. kept: dense module -> why it was kept. kept_bytes: tensors that belong to no
    packed module. bias_bytes: biases of packed modules. file_bytes: safetensors files with headers.
    source_bytes: tensors of the dense checkpoint. copied: files carried along. left: name -> why a file was not.
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

    @property
    def bpw(self) -> float:
        """Stored bits for each packed weight, everything included."""
        return self.packed.bits_per_weight

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the totals."""
        data = asdict(self)
        data["packed"] |= {"total_bytes": self.packed.total_bytes, "bpw": self.bpw}
        return data
