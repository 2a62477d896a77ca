"""Scores of layers and linears by their outputs: how spread they are, and how much of a prediction they carry.

entropy      H = -sum p ln p over the shares p of CLUSTERS clusters (k-means) of what leaves a layer, a vector for each
             token: LUQ, https://arxiv.org/abs/2509.23729, whose layers of low entropy bear one bit
relevance    layer-wise relevance propagation from the logit z of the token that the model predicts: the part of z that
             comes through the outputs y of a linear is y dz/dy, which is LRP's rule for linears (its rule 0), taken
             through norms, softmax and gates by their gradients: after LRP-QViT, https://arxiv.org/abs/2401.11243
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .inputs import batches, one_stack

CLUSTERS = 100  # LUQ's; its ranking of layers is stable from there on
ROUNDS = 25
SEED = 0


def cluster_entropy(points: torch.Tensor, clusters: int) -> float:
    """Entropy in nats of the shares of k-means clusters of points [n, d]; never more clusters than points differ."""
    points = points.float()
    draw = torch.Generator(device="cpu").manual_seed(SEED)
    # k-means++: each new centre is drawn by its squared distance to those there are.
    centres = points[torch.randint(len(points), (1,), generator=draw).to(points.device)]
    nearest = torch.cdist(points, centres)[:, 0].square()
    while len(centres) < min(clusters, len(points)) and bool(nearest.max() > 0):
        chosen = points[torch.multinomial(nearest.cpu(), 1, generator=draw).to(points.device)]
        centres = torch.cat([centres, chosen])
        nearest = torch.minimum(nearest, torch.cdist(points, chosen)[:, 0].square())
    for _ in range(ROUNDS):
        owner = torch.cdist(points, centres).argmin(1)
        counts = owner.bincount(minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        moved = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    shares = torch.cdist(points, centres).argmin(1).bincount().double() / len(points)
    return float(-(shares * shares.clamp(min=1e-300).log()).sum())


@torch.no_grad()
def layer_entropies(model: Any, tokens: torch.Tensor) -> list[float]:
    """Entropy of what leaves each layer on tokens int64 [windows, window]. Raises PlanError: not one stack."""
    blocks = list(one_stack(model).values())
    kept: list[list[torch.Tensor]] = [[] for _ in blocks]

    def see(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            kept[index].append(out.reshape(-1, out.shape[-1]).float())

        return hook

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            hooks.callback(block.register_forward_hook(see(index)).remove)
        for batch in batches(tokens):
            model(input_ids=batch.to(model.device), use_cache=False)
    return [cluster_entropy(torch.cat(outputs), CLUSTERS) for outputs in kept]


def output_relevance(model: Any, tokens: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """Part of all relevance that goes through each linear, by name: mean over tokens of |sum over outputs of y dz/dy|.

    z: the logits of the tokens that the model holds the most likely, at all positions together.
    """
    sums = dict.fromkeys(names, 0.0)

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: torch.Tensor) -> None:
            def add(grad: torch.Tensor) -> None:
                sums[name] += float((grad.double() * out.detach().double()).sum(-1).abs().sum())

            if not out.requires_grad:
                out.requires_grad_()
            out.register_hook(add)

        return hook

    wanted = [parameter.requires_grad for parameter in model.parameters()]
    with ExitStack() as hooks:
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_hook(see(name)).remove)
        model.requires_grad_(False)
        try:
            with torch.enable_grad():
                for batch in batches(tokens):
                    logits = model(input_ids=batch.to(model.device), use_cache=False).logits
                    logits.float().amax(-1).sum().backward()
        finally:
            for parameter, value in zip(model.parameters(), wanted, strict=True):
                parameter.requires_grad_(value)
    total = sum(sums.values())
    return {name: value / total for name, value in sums.items()} if total else sums
