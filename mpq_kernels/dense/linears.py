"""`LinearSpec`: one linear of a model by name and shape, and the stored tensors, or parts of them, that feed it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .conversions import Origin

# Packed weights of a module of experts, and the linears of an expert that are stacked in each, in this order. Experts
# without a gate have an up projection alone in the first. The names are not those of transformers' parameters, which
# its converters would reshape.
GATE_UP, DOWN = "gate_up", "down"
PARTS = {GATE_UP: ("gate", "up"), DOWN: ("down",)}


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a tensor that holds one expert after the other: expert `index`, rows start..stop in steps of `step`.

    transposed: an expert is stored as [K, N]. A bias [experts, N] is cut in the same way.
    """

    index: int
    transposed: bool
    start: int
    stop: int
    step: int = 1

    def weight(self, stored: torch.Tensor) -> torch.Tensor:
        """W [N, K] from [experts, N', K] or [experts, K, N'], contiguous: a copy only where the tensor is not."""
        matrix = stored[self.index].T if self.transposed else stored[self.index]
        return matrix[self.start : self.stop : self.step].contiguous()

    def put(self, stored: torch.Tensor, weight: torch.Tensor) -> None:
        """Write W [N, K] to where `weight` reads it, in the dtype of the tensor."""
        matrix = stored[self.index].T if self.transposed else stored[self.index]
        matrix[self.start : self.stop : self.step].copy_(weight)

    def bias(self, stored: torch.Tensor) -> torch.Tensor:
        """[N] from [experts, N']."""
        return stored[self.index, self.start : self.stop : self.step].contiguous()


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """The place of a linear in a mixture: which expert of which module, and what it is there.

    block: the module of all experts, as the files name it; module: as the model does. part: "gate", "up" or "down".
    cut: which part of the stored tensor it is; None where the tensor is the linear's alone.
    """

    block: str
    module: str
    index: int
    count: int
    part: str
    cut: Cut | None = None


@dataclass(frozen=True)
class LinearSpec:
    """One linear of the model: a module of one of the classes in kinds.py, or one projection of one expert.

    name: of the module; of an expert's projection, the one that its tensor has in the files, or would have there if it
    were stored alone. tensor feeds its weight, bias_tensor its bias; names as stored. is_head: the output head. tied:
    its weight is also the input embedding, so packing it leaves the embedding dense. router: it scores experts.
    transposed: its weight is stored as [K, N]. tower: it reads images or sound, or what is made of them (towers.py).
    origin, bias_origin: where transformers makes weight and bias of other tensors, how; `tensor` and `bias_tensor` are
    then the first of those.

    An embedding is one too (embedding=True): out_features rows of in_features, looked up by number. shared: the other
    modules that use its weight, such as a tied head.
    """

    name: str
    out_features: int
    in_features: int
    tensor: str
    bias_tensor: str | None = None
    is_head: bool = False
    tied: bool = False
    expert: ExpertPart | None = None
    router: bool = False
    transposed: bool = False
    tower: bool = False
    origin: Origin | None = None
    bias_origin: Origin | None = None
    embedding: bool = False
    shared: tuple[str, ...] = ()

    def weight_of(self, stored: torch.Tensor) -> torch.Tensor:
        """W [N, K] from the tensor called `tensor`, or the one made of it, contiguous: a copy only where it is not."""
        cut = self.expert.cut if self.expert else None
        if cut is not None:
            return cut.weight(stored)
        return stored.T.contiguous() if self.transposed else stored

    def bias_of(self, stored: torch.Tensor) -> torch.Tensor:
        """[N] from the tensor called `bias_tensor`, or the one made of it."""
        cut = self.expert.cut if self.expert else None
        return stored if cut is None else cut.bias(stored)
