"""A gated MLP whose gate is applied inside its down projection: one launch where there were three.

    down_proj(silu(gate_proj(x)) * up_proj(x))        two launches and two intermediates less for a few tokens

`GatedMLP` stands where the model has its own module, under the same names. Which modules compute just that is not read
off their names: `gates_by_silu` runs each once, on the host, over stand-ins of its projections.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..backends import BACKENDS
from .linear import MixedLinear

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Tokens of the decode kernels (csrc/cuda/decode.cu): with more, each block would compute the activation of the same x
# again. Where that stops to pay has not been measured.
MOST_TOKENS = 16


class GatedMLP(nn.Module):
    """Drop-in for a gated MLP with a packed down projection. The projections keep their names and stay its children.

    family: the module that it replaces; attributes that this one lacks are read from it.
    """

    def __init__(self, family: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that it is not registered: its children are this module's.
        self._family = (family,)
        for name, child in family.named_children():
            self._modules[name] = child  # add_module would find the family's
        self.training = family.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., hidden). Returns (..., hidden) in x.dtype; the gate is rounded as the family rounds it."""
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        few = type(down) is MixedLinear and up.numel() <= MOST_TOKENS * down.in_features
        y: torch.Tensor = down(up, gate) if few else down(self.act_fn(gate) * up)
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_family":  # while a copy or a pickle is being made
                raise
            return getattr(self._family[0], name)


def fuse_gates(model: nn.Module) -> list[str]:
    """Put a GatedMLP where it can be used: a packed down projection, and a backend here that takes the gate.

    Returns the names of the modules that were replaced; none on a machine whose backends have no such product.
    """
    if not any(b.silu_mul_linear is not None and b.why_unavailable() is None for b in BACKENDS.values()):
        return []
    names = [
        name
        for name, module in model.named_modules()
        if name and type(getattr(module, "down_proj", None)) is MixedLinear and gates_by_silu(module)
    ]
    for name in names:
        model.set_submodule(name, GatedMLP(model.get_submodule(name)))
    return names


class _StandIn(nn.Module):
    """Gives what it is told to, and keeps what it was called with."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = answer
        self.seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Whatever x is."""
        self.seen = x
        return self.answer


@torch.no_grad()
def gates_by_silu(module: nn.Module) -> bool:
    """Whether module(x) is down_proj(silu(gate_proj(x)) * up_proj(x)) and nothing else, in both of its modes."""
    children = dict(module.named_children())
    if not set(PROJECTIONS) <= set(children) or not isinstance(getattr(module, "act_fn", None), nn.Module):
        return False
    if set(children) - {*PROJECTIONS, "act_fn"} or module._parameters or module._buffers:
        return False
    generator = torch.Generator().manual_seed(0)
    x, gate, up, y = (torch.randn(3, 5, generator=generator, device="cpu") * 4 for _ in range(4))
    trial = copy.copy(module)
    stand_ins = {name: _StandIn(answer) for name, answer in zip(PROJECTIONS, (gate, up, y), strict=True)}
    trial._modules = {**module._modules, **stand_ins}
    for mode in (True, False):
        trial.training = mode
        try:
            found = trial(x)
        except Exception:  # another module of the same names may want anything, and raise anything
            return False
        seen = [stand_ins[name].seen for name in PROJECTIONS]
        if found is not y or seen[0] is not x or seen[1] is not x or seen[2] is None:
            return False
        if not torch.equal(seen[2], nn.functional.silu(gate) * up):
            return False
    return True
