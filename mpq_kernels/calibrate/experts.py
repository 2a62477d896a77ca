"""Calibration of the experts of a mixture: every expert has Hessians of its own.

    router --top k--> [experts]  gate, up of expert e   mean of x^T x over the rows x that are routed to e
                                 down of expert e       the same of what e's own gate_up and gate make of those rows

One pass over the calibration tokens keeps what a module of experts reads, and who is to read it; then one expert after
the other has its rows picked. An expert that no token reaches is calibrated as if all were routed to it: what the
module reads is then the best guess at what the expert will, and its own gate makes the inputs of its down projection,
whose columns have no counterparts in other experts. With few rows, the damping makes the Hessian positive definite.

Memory: what one module reads for all calibration tokens, fp32 [tokens, hidden], as large as the hidden states between
two blocks; the rows of one batch; one Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..dense.checkpoint import DenseCheckpoint
from ..dense.experts import expert_shapes, expert_update
from ..dense.linears import GATE_UP
from ..dense.model import build_meta_model
from ..errors import QuantizeError
from ..plan.resolve import ResolvedPlan, ResolvedWeight
from .walk import BlockWalk, Stop, find_blocks, places_of, stage_of


class Moment:
    """Mean of x^T x over rows that come batch by batch. Products are fp32, their sum and `mass` (of weights) fp64."""

    def __init__(self, name: str, size: int, device: torch.device) -> None:
        self.name, self.mass = name, 0.0
        self.total = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, weights: torch.Tensor | None) -> None:
        """x: fp32 [n, K]. weights: fp32 [n] >= 0, or None. Raises QuantizeError."""
        if not bool(torch.isfinite(x).all()):
            raise QuantizeError(f"{self.name}: the calibration tokens give NaN or Inf in its input")
        self.mass += len(x) if weights is None else weights.sum(dtype=torch.float64).item()
        x = x if weights is None else x * weights.sqrt()[:, None]
        self.total.add_(x.T @ x)

    def mean(self) -> torch.Tensor:
        """fp64 [K, K], in the memory of the sum. Raises QuantizeError when there was nothing to add."""
        if not self.mass:
            raise QuantizeError(f"{self.name}: the weights of all calibration tokens are 0")
        return self.total.div_(self.mass)


class Routed:
    """What a module of experts reads for all calibration tokens, and the experts that read it."""

    def __init__(self, name: str, experts: Any) -> None:
        """name: of the module, for messages. experts: the module, whose parameters are read when they are needed."""
        self.name, self.experts = name, experts
        self.batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def add(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor | None) -> None:
        """A call of the module. hidden: [..., hidden]. index: [..., k] of experts. weights: fp32 [tokens] or None."""
        hidden = hidden.reshape(-1, hidden.shape[-1]).float()
        index = index.reshape(-1, index.shape[-1])
        if len(index) != len(hidden) or (weights is not None and len(weights) != len(hidden)):
            raise QuantizeError(
                f"{self.name}: reads {len(hidden)} rows for {len(index)} choices of experts"
                + ("" if weights is None else f" and {len(weights)} tokens, so weights cannot be matched")
            )
        self.batches.append((hidden, index, weights))

    def reached(self, expert: int) -> bool:
        """Whether any token is routed to an expert, and counts."""
        for _, index, weights in self.batches:
            chosen = (index == expert).any(1)
            if bool((chosen if weights is None else chosen & (weights > 0)).any()):
                return True
        return False

    def hessian(self, expert: int, leaf: str) -> torch.Tensor:
        """Mean of x^T x of "gate_up" or "down" of an expert, fp64 [K, K], with the weights it has now.

        Raises QuantizeError: NaN or Inf, the weights of all tokens are 0.
        """
        _, cols = expert_shapes(self.experts)[1][leaf]
        moment = Moment(f"{self.name}, {leaf} of expert {expert}", cols, self.batches[0][0].device)
        for rows, weights in self._rows(expert, everyone=not self.reached(expert)):
            moment.add(rows if leaf == GATE_UP else expert_update(self.experts, expert, rows), weights)
        return moment.mean()

    def _rows(self, expert: int, everyone: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Rows and weights of each batch: those routed to an expert, or everyone's."""
        for hidden, index, weights in self.batches:
            chosen = slice(None) if everyone else (index == expert).any(1)
            yield hidden[chosen], None if weights is None else weights[chosen]


@torch.no_grad()
def route(walk: BlockWalk, module: str, weigh: Callable[[int], torch.Tensor | None]) -> Routed:
    """What a module of experts of the current block reads, with the block's weights as they are now.

    weigh: fp32 [tokens] of a batch by its index, or None. Raises QuantizeError when a batch does not get there.
    """
    routed = Routed(module, walk.model.get_submodule(module))
    weights: torch.Tensor | None = None

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """experts(hidden_states, top_k_index, top_k_weights)"""
        given = dict(zip(("hidden_states", "top_k_index"), args, strict=False)) | kwargs
        hidden, index, counted = given["hidden_states"], given.get("top_k_index"), weights
        if index is None:  # the rows of every expert, sorted and equally many: all tokens, once for each
            count = expert_shapes(routed.experts)[0]
            each = hidden.reshape(-1, hidden.shape[-1]).shape[0] // count
            index = torch.arange(count, device=hidden.device).repeat_interleave(each).unsqueeze(1)
            counted = None if weights is None else weights.repeat(count)
        routed.add(hidden, index, counted)
        raise Stop

    handle = routed.experts.register_forward_pre_hook(see, with_kwargs=True)
    try:
        for index in range(len(walk.batches)):
            weights = weigh(index)
            walk.forward(index)
    finally:
        handle.remove()
    if len(routed.batches) != len(walk.batches):
        raise QuantizeError(
            f"{module}: not every batch of tokens reaches these experts; keep them in 16 bits (bits=16)"
        )
    return routed


def in_walk_order(resolved: ResolvedPlan, source: DenseCheckpoint) -> ResolvedPlan:
    """The same plan with its weights in the order of calibration: block by block, the experts of a block at its end.

    In model order, experts stand behind all linears. Raises QuantizeError: a model without blocks; CheckpointError.
    """
    places = places_of(find_blocks(build_meta_model(source.path)))

    def place(weight: ResolvedWeight) -> tuple[int, bool]:
        experts = weight.experts
        name = weight.members[0].spec.name if experts is None else experts.module
        return stage_of(places, name), experts is not None

    ordered = tuple(sorted(resolved.weights, key=place))
    return resolved if ordered == resolved.weights else replace(resolved, weights=ordered)
