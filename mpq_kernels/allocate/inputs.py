"""What the linears of a model read on a text: second moments, extremes, routing; one pass through the whole model.

Everything is kept at once: 4 K**2 bytes for each input that is read. An 8B model of hidden size 4096 and intermediate
size 14336 would need 33 GB; methods that look at weights or at whole layers need none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..calibrate.walk import find_blocks, places_of, stage_of
from ..dense.experts import expert_update
from ..dense.linears import LinearSpec
from ..errors import PlanError

BATCH_TOKENS = 2048


@dataclass
class Inputs:
    """Of each linear, by name.

    moments: mean over all tokens of x x^T, fp32 [K, K]; linears that read the same tensor share it. Of an expert, the
    tokens that are not routed to it count as 0, and the others with the square of their routing weight. peak: max |x|;
    typical: mean |x|. share: part of the tokens routed to an expert; gate: mean routing weight of those.
    """

    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)
    typical: dict[str, float] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)
    gate: dict[str, float] = field(default_factory=dict)


TokenWeights = Callable[[int, int], torch.Tensor | None]  # (batch, layer) -> [n, sequence]


@torch.no_grad()
def collect_inputs(
    model: Any, tokens: torch.Tensor, linears: Sequence[LinearSpec], weights: TokenWeights | None = None
) -> Inputs:
    """Statistics of the inputs of `linears` on tokens int64 [windows, window]. weights: of the tokens in the moments.

    Raises PlanError for a linear that no token reaches.
    """
    found = _Collector(model, weights)
    plain = [spec.name for spec in linears if spec.expert is None]
    modules = {spec.expert.module for spec in linears if spec.expert is not None}
    with ExitStack() as hooks:
        for name in plain:
            hooks.enter_context(_hook(model.get_submodule(name), found.linear(name)))
        for name in modules:
            experts = [spec for spec in linears if spec.expert is not None and spec.expert.module == name]
            hooks.enter_context(_hook(model.get_submodule(name), found.experts(name, experts)))
        for index, batch in enumerate(batches(tokens)):
            found.batch = index
            model(input_ids=batch.to(model.device), use_cache=False)
    out = found.finish(tokens.numel())
    missing = [spec.name for spec in linears if spec.name not in out.moments]
    if missing:
        raise PlanError(f"{missing[0]}: no token of the calibration text reaches it, nor {len(missing) - 1} others")
    return out


def batches(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Windows in batches of about BATCH_TOKENS tokens."""
    return tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))


class _Collector:
    """Sums while batches run; linears that are called with the very same tensor share one sum."""

    def __init__(self, model: Any, weights: TokenWeights | None) -> None:
        self.model, self.weights, self.batch = model, weights, 0
        self.sums: dict[str, torch.Tensor] = {}
        self.leader: dict[str, str] = {}
        self.last: tuple[str, torch.Tensor] | None = None
        self.out = Inputs()
        self.seen: dict[str, int] = {}

    def linear(self, name: str) -> Callable[..., None]:
        """Hook of a linear."""

        def see(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            """Add the linear's x; linears that are called with the same tensor share one sum."""
            x = args[0]
            if self.last is not None and self.last[1] is x:
                self.leader[name] = self.last[0]
                return
            self.leader[name], self.last = name, (name, x)
            flat = x.reshape(-1, x.shape[-1]).float()
            self._extremes(name, flat)
            weights = None if self.weights is None else self.weights(self.batch, self._layer(name))
            self._add(name, flat if weights is None else flat * weights.reshape(-1, 1).sqrt())

        return see

    def experts(self, name: str, specs: Sequence[LinearSpec]) -> Callable[..., None]:
        """Hook of a module of experts: hidden states [T, H], chosen experts [T, k], their weights [T, k]."""

        def see(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            hidden, index, gate = args[:3]
            for expert in range(specs[0].expert.count if specs[0].expert else 0):
                token, place = torch.where(index == expert)
                parts = {spec.expert.part: spec.name for spec in specs if spec.expert and spec.expert.index == expert}
                x, weight = hidden[token].float(), gate[token, place].float()
                between = expert_update(module, expert, hidden[token]).float()
                for part, values in (("gate", x), ("up", x), ("down", between)):
                    if part not in parts:
                        continue
                    key = parts[part]
                    self.leader[key] = parts["gate"] if part == "up" and "gate" in parts else key
                    self.out.share[key] = self.out.share.get(key, 0.0) + len(token)
                    self.out.gate[key] = self.out.gate.get(key, 0.0) + float(weight.sum())
                    if self.leader[key] == key:
                        self._extremes(key, values)
                        self._add(key, values * weight[:, None])

        return see

    def _layer(self, name: str) -> int:
        places = places_of(one_stack(self.model))
        stage = stage_of(places, name)
        return -1 if stage == len(places) else stage

    def _extremes(self, name: str, x: torch.Tensor) -> None:
        if x.numel():
            self.out.peak[name] = max(self.out.peak.get(name, 0.0), float(x.abs().max()))
        self.out.typical[name] = self.out.typical.get(name, 0.0) + float(x.abs().sum())
        self.seen[name] = self.seen.get(name, 0) + x.numel()

    def _add(self, name: str, x: torch.Tensor) -> None:
        total = self.sums.get(name)
        self.sums[name] = x.T @ x if total is None else total.add_(x.T @ x)

    def finish(self, tokens: int) -> Inputs:
        """Sums to means."""
        for name in self.sums:
            self.sums[name] = self.sums[name] / tokens
        for name, leader in self.leader.items():
            self.out.moments[name] = self.sums[leader]
            self.out.peak[name] = self.out.peak.get(leader, 0.0)
        typical = {name: self.out.typical[lead] / max(1, self.seen[lead]) for name, lead in self.leader.items()}
        self.out.typical = typical
        for name, count in self.out.share.items():
            self.out.gate[name] = self.out.gate[name] / count if count else 0.0
            self.out.share[name] = count / tokens
        return self.out


@contextmanager
def _hook(module: Any, see: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(see)
    try:
        yield
    finally:
        handle.remove()


def one_stack(model: Any) -> dict[str, nn.Module]:
    """Name -> layer of a model whose layers are one stack. Raises PlanError for another."""
    blocks = find_blocks(model)
    stacks = dict.fromkeys(name.rpartition(".")[0] for name in blocks)
    if len(stacks) > 1:
        raise PlanError(
            f"this method compares the layers of one stack, and {type(model).__name__} has {', '.join(stacks)}; "
            "choose another"
        )
    return blocks


@torch.no_grad()
def layer_cosines(model: Any, tokens: torch.Tensor) -> list[float]:
    """Mean over tokens of the cosine between what enters and what leaves each layer."""
    blocks = one_stack(model)
    totals = [0.0] * len(blocks)

    def see(index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = out[0] if isinstance(out, tuple) else out
            cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            totals[index] += float(cosine.double().sum())

        return hook

    handles = [block.register_forward_hook(see(i), with_kwargs=True) for i, block in enumerate(blocks.values())]
    try:
        for batch in batches(tokens):
            model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [total / tokens.numel() for total in totals]


def attention_received(model: Any, tokens: torch.Tensor, least: float = 0.05) -> TokenWeights:
    """Weights of tokens by the attention they receive in each layer, summed over heads and queries.

    Mapped linearly onto [least, 1] in every window, then to a mean of 1. Source: RSQ, https://arxiv.org/abs/2503.01820.
    """
    kind = model.config._attn_implementation
    model.set_attn_implementation("eager")
    kept: list[list[torch.Tensor]] = []
    try:
        with torch.no_grad():
            for batch in batches(tokens):
                out = model(input_ids=batch.to(model.device), use_cache=False, output_attentions=True)
                kept.append([_mapped(layer.float().sum(dim=(1, 2)), least) for layer in out.attentions])
    finally:
        model.set_attn_implementation(kind)
    return lambda batch, layer: kept[batch][layer] if layer >= 0 else None


def _mapped(received: torch.Tensor, least: float) -> torch.Tensor:
    low, high = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
    weights = least + (1 - least) * (received - low) / (high - low).clamp(min=1e-12)
    return weights / weights.mean(1, keepdim=True)


def output_gradients(model: Any, tokens: torch.Tensor, names: Sequence[str], seed: int = 0) -> dict[str, torch.Tensor]:
    """Mean over tokens of the squared gradient of the summed loss with respect to each output: fp32 [N] by linear.

    The labels are drawn from the model's own predictions, so that this is the diagonal of the Fisher information of the
    outputs, not of the noise of a text.
    """
    draw = torch.Generator(device="cpu").manual_seed(seed)
    sums: dict[str, torch.Tensor] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: torch.Tensor) -> None:
            def add(grad: torch.Tensor) -> None:
                part = grad.float().square().reshape(-1, grad.shape[-1]).sum(0)
                sums[name] = sums[name] + part if name in sums else part

            if not out.requires_grad:
                out.requires_grad_()
            out.register_hook(add)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(see(name)) for name in names]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            for batch in batches(tokens):
                logits = model(input_ids=batch.to(model.device), use_cache=False).logits.float().flatten(0, 1)
                with torch.no_grad():
                    labels = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=draw)[:, 0].to(logits.device)
                nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    finally:
        for parameter, value in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(value)
        for handle in handles:
            handle.remove()
    return {name: total / tokens.numel() for name, total in sums.items()}
