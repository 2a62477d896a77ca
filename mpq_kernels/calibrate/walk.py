"""A transformers model run block by block: the hidden states between two blocks are kept, and nothing else.

    forward(batch)   model(tokens), in which passed blocks hand on the kept hidden states, the current one runs on them,
                     and the run ends there
    advance()        what the current block makes of all batches takes their place; the block is released, the next one
                     is loaded

Masks, positions and other arguments of a block are thus made by the model itself, as for any other run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..dense.kinds import is_linear, is_transposed
from ..errors import QuantizeError
from ..quantize import suitable

BATCH_TOKENS = 4096  # read at once


class Stop(Exception):
    """Ends a forward pass when all that was asked of it has been seen. May be raised by hooks."""


class BlockWalk:
    """The walk of some tokens through a model's blocks.

    batches: tokens int64 [n, sequence] each. hidden: what enters the current block for each, fp32 [n, sequence,
    hidden]. current: index of that block; the number of blocks when the walk is through and only the head is left.
    """

    def __init__(self, model: Any, rows: torch.Tensor, device: torch.device, load: Callable[[int], None]) -> None:
        """Stand before the first block. The model is changed: blocks that were passed are on the meta device.

        load: gives a block its parameters, in fp32 on the device; for the number of blocks, all outside of them.
        Raises QuantizeError: a model that is not one stack of blocks.
        """
        self.model, self.device, self.load = model.eval(), device, load
        self.prefix, self.blocks = find_blocks(model)
        self.batches = rows.to(device).split(max(1, BATCH_TOKENS // rows.shape[1]))
        load(len(self.blocks))
        for index, block in enumerate(self.blocks):
            block.forward = self._forward_of(index, block.forward)
        self.current = 0
        self.tuples = False
        self.output: torch.Tensor | None = None
        self.hidden: list[torch.Tensor] = []
        for index in range(len(self.batches)):
            self.hidden.append(self.forward(index))
        self._enter()

    def stage(self, name: str) -> int:
        """Index of the block that a module is in; the number of blocks for one outside."""
        return stage_of(self.prefix, len(self.blocks), name)

    def linears(self) -> list[str]:
        """Names of the linears of the current stage."""
        named = self.model.named_modules()
        return [name for name, module in named if is_linear(module) and self.stage(name) == self.current]

    @torch.no_grad()
    def set_weight(self, name: str, weight: torch.Tensor) -> None:
        """Replace the weight [N, K] of a linear in the current block. A head keeps its own, which may be tied."""
        if self.stage(name) < len(self.blocks):
            linear = self.model.get_submodule(name)
            linear.weight.copy_(weight.T if is_transposed(linear) else weight)

    @torch.no_grad()
    def forward(self, index: int) -> torch.Tensor:
        """Run one batch through the current stage, until a hook raises Stop. Returns hidden states: what leaves the
        block, or what entered the stage where it was stopped. Without kept hidden states: what enters the first block.
        """
        self.input = self.hidden[index] if index < len(self.hidden) else None
        self.output = self.input
        with contextlib.suppress(Stop):
            self.model(input_ids=self.batches[index], use_cache=False)
        assert self.output is not None
        return self.output

    @torch.no_grad()
    def advance(self) -> None:
        """Go on to the next block."""
        for index in range(len(self.batches)):
            self.hidden[index].copy_(self.forward(index))  # in place: freed and asked for again, it would leave holes
        self.blocks[self.current].to("meta")
        self.current += 1
        self._enter()

    def _enter(self) -> None:
        if self.current < len(self.blocks):
            self.load(self.current)

    def _forward_of(self, index: int, run: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for the forward method of a block."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            """Passes over blocks that are done, feeds the present one its hidden states, and stops behind it."""
            if self.input is None:
                self.output = args[0] if args else kwargs["hidden_states"]
                raise Stop
            if index < self.current:
                return (self.input,) if self.tuples else self.input
            if args:
                args = (self.input, *args[1:])
            else:
                kwargs["hidden_states"] = self.input
            out = run(*args, **kwargs)
            self.tuples = isinstance(out, tuple | list)
            self.output = out[0] if self.tuples else out
            raise Stop

        return forward


def stage_of(prefix: str, blocks: int, name: str) -> int:
    """Index of the block that a module or parameter is in; the number of blocks for one outside. prefix: their list."""
    inner = name.removeprefix(f"{prefix}.").partition(".")[0]
    return int(inner) if name.startswith(f"{prefix}.") and inner else blocks


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the one outermost ModuleList that has linears. Raises QuantizeError."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        outermost = isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found)
        if outermost and any(map(is_linear, module.modules())):
            found[name] = module
    if len(found) != 1:
        raise QuantizeError(
            f"calibration walks through a model that is one stack of blocks, and {type(model).__name__} has "
            f"{', '.join(found) or 'none'}; choose a quantizer that needs no calibration: "
            f"{suitable(lambda row: not row.needs_calibration)}"
        )
    return next(iter(found.items()))
