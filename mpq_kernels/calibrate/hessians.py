"""Calibration: what the inputs of every linear look like on a text, block by block, with bounded memory.

    tokens -> embedding -> [block 0] -> [block 1] -> ...        hidden states [tokens, hidden] between blocks are kept
                             |  hessian("...q_proj")            x^T x of one input at a time
                             |  set_weight("...q_proj", ...)    the quantized weight takes the dense one's place

Inputs come from layers that are already quantized, in earlier blocks and inside the block, because that is what the
layer will read when the packed model runs: its codes then also make up for part of the error before it.

Memory does not grow with the number of blocks: all outside of the blocks in fp32, one block in fp32 (read from the
files when the walk comes to it, released behind it: load.py), its inputs for all calibration tokens and what else the
model's own forward keeps of them (walk.py), and one Hessian in fp64 with its factor; where experts are packed, what one
module of them reads (experts.py). The same input gives the same bytes on one machine with one number of threads: matrix
products of another number of threads add up in another order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch

from ..dense.checkpoint import DenseCheckpoint
from ..dense.experts import model_experts
from ..dense.kinds import linear_shape
from ..dense.linears import DOWN, GATE_UP, PARTS, ExpertPart
from ..errors import QuantizeError
from .calibration import Calibration
from .experts import Moment, Routed, route
from .load import StoredModel
from .walk import BlockWalk, Stop


class Loaded(Protocol):
    """A model, and how its parameters come to be there: StoredModel, or the skeleton of a trial."""

    model: Any

    def load(self, stage: int) -> None:
        """Give a block its parameters; for the number of blocks, all that is outside of them."""


class Calibrator:
    """Hessians of a model's linears, which must be asked for in the model's order, block by block."""

    def __init__(self, source: DenseCheckpoint, calibration: Calibration, dense: Loaded | None = None) -> None:
        """Loads what lies outside of the blocks, and the first of them. dense: the model; None: the stored one.

        Raises QuantizeError: tokens that do not fit the model, a model that cannot be walked; CheckpointError.
        """
        self.calibration = calibration
        device = torch.device(calibration.device)
        dense = StoredModel(source, device) if dense is None else dense
        inputs = calibration.inputs(source.path, dense.model.config)
        self.walk = BlockWalk(dense.model, inputs, device, dense.load)
        self.leaders: dict[str, str] = {}  # linear of this stage -> the first that reads the same tensor
        self.calls: Counter[str] = Counter()
        self.held: tuple[str, torch.Tensor] | None = None
        self.experts = {spec.name: spec.expert for spec in source.linears() if spec.expert is not None}
        self.places = {  # where the model has the weight of an expert's linear: parameter, and the part of it
            (spec.expert.module, spec.expert.index, spec.expert.part): (spec.tensor, spec.expert.cut)
            for spec in model_experts(dense.model)
            if spec.expert is not None and spec.expert.cut is not None
        }
        self.routed: Routed | None = None
        self.unreached: dict[str, None] = {}  # experts that no token was routed to, in the order in which they came
        self._probe()

    @torch.no_grad()
    def hessian(self, name: str) -> torch.Tensor:
        """Damped mean of x^T x over the tokens that the linear reads: fp64 [K, K] on the calibration device.

        Raises QuantizeError: no token reaches it, NaN or Inf in its input, a block that has been passed.
        """
        leader = self.check(name)
        if leader is None:
            return self._expert_hessian(self.experts[name])
        if self.held is None or self.held[0] != leader:
            self.held = None  # released before the next one is made
            self.held = (leader, damped(self._collect(leader), self.calibration.damping))
        return self.held[1]

    def check(self, name: str) -> str | None:
        """Go on to a linear; the first one that reads the same, None for an expert's. QuantizeError: no token does."""
        self.enter(name)
        if name in self.experts:
            return None
        if name not in self.leaders:
            raise QuantizeError(
                f"{name}: no token of the first {self.walk.batches[0].numel()} calibration tokens reaches this linear; "
                "keep it in 16 bits (bits=16)"
            )
        return self.leaders[name]

    @torch.no_grad()
    def enter(self, name: str) -> None:
        """Go on to the block of a linear; of an expert's, find out who is routed to it. QuantizeError: it is passed."""
        expert = self.experts.get(name)
        stage = self.walk.stage(name if expert is None else expert.module)
        if stage < self.walk.current:
            raise QuantizeError(
                f"{name}: calibration has already passed its block; linears are quantized in the order of the blocks"
            )
        while self.walk.current < stage:
            self.walk.advance()
            self._probe()
        if expert is not None:
            if self.routed is None or self.routed.name != expert.module:
                self.routed = None  # released before the next one is made
                self.routed = route(self.walk, expert.module, self._weights)
            if not self.routed.reached(expert.index):
                self.unreached[f"{expert.block}.{expert.index}"] = None

    @torch.no_grad()
    def set_weight(self, name: str, weight: torch.Tensor) -> None:
        """Give the linear its quantized weight [N, K], so that what follows it is calibrated on its output."""
        expert = self.experts.get(name)
        if expert is None:
            self.walk.set_weight(name, weight)
            return
        parameter, cut = self.places[expert.module, expert.index, expert.part]
        cut.put(self.walk.model.get_parameter(parameter), weight)

    def _expert_hessian(self, expert: ExpertPart) -> torch.Tensor:
        """As `hessian`; gate and up of an expert have one."""
        assert self.routed is not None and self.routed.name == expert.module, "enter() came first"
        leaf = DOWN if expert.part in PARTS[DOWN] else GATE_UP
        key = f"{expert.module}.{expert.index}.{leaf}"
        if self.held is None or self.held[0] != key:
            self.held = None
            self.held = (key, damped(self.routed.hessian(expert.index, leaf), self.calibration.damping))
        return self.held[1]

    @torch.no_grad()
    def _probe(self) -> None:
        """Find out which linears of this stage read the same tensor, and how often each is called."""
        self.held = self.routed = None
        seen = self.walk.outside(0)
        with ExitStack() as hooks:
            for name in self.walk.linears():
                hooks.enter_context(self._hook(name, lambda x, name=name: seen.append((name, x))))  # type: ignore[misc]
            self.walk.forward(0)
        self.calls = Counter(name for name, _ in seen)
        self.leaders = {name: next(other for other, y in seen if y is x) for name, x in reversed(seen)}

    def _collect(self, leader: str) -> torch.Tensor:
        """Mean of x^T x over all inputs of one linear. Raises QuantizeError."""
        size = linear_shape(self.walk.model.get_submodule(leader))[1]
        moment, left = Moment(leader, size, self.walk.device), 0
        weights: torch.Tensor | None = None

        def add(x: torch.Tensor) -> None:
            """Take one input in; the last that a batch can bring ends its forward pass."""
            nonlocal left
            x = x.reshape(-1, size).float()
            if weights is not None and len(x) != len(weights):
                raise QuantizeError(f"{leader}: reads {len(x)} of {len(weights)} tokens, so weights cannot be matched")
            moment.add(x, weights)
            left -= 1
            if not left:
                raise Stop

        outside = self.walk.current == len(self.walk.blocks)
        with nullcontext() if outside else self._hook(leader, add):
            for index in range(len(self.walk.batches)):
                weights, left = self._weights(index), self.calls[leader]
                for _, x in (pair for pair in self.walk.outside(index) if pair[0] == leader):
                    with suppress(Stop):
                        add(x)
                self.walk.forward(index)
        return moment.mean()

    def _weights(self, index: int) -> torch.Tensor | None:
        """Weights fp32 [tokens] of a batch, or None. Raises QuantizeError."""
        if self.calibration.token_weights is None:
            return None
        tokens = self.walk.batches[index]
        weights = self.calibration.token_weights(self.walk.hidden[index], tokens, self.walk.current)
        if weights.shape != tokens.shape:
            raise QuantizeError(f"token_weights gave {list(weights.shape)} for tokens {list(tokens.shape)}")
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
            raise QuantizeError("token_weights gave NaN, Inf or a negative weight")
        return weights.reshape(-1).to(self.walk.device, torch.float32)

    @contextmanager
    def _hook(self, name: str, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
        module = self.walk.model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda module, args: see(args[0]))
        try:
            yield
        finally:
            handle.remove()


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """hessian [K, K] + damping * mean of its diagonal on the diagonal, in place; the identity when all of it is 0.

    A column whose input is always 0 then stands alone, and its weights are simply rounded.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    diagonal.add_(damping * mean if mean else 1.0)
    return hessian
