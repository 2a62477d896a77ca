"""The layers of peft's adapters that stand beside a packed weight; adapters.py puts them there.

Each is peft's own layer: same tensors, same names, so that an adapter serves the packed and the dense model alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import IA3Config, LoraConfig
from peft.tuners.ia3 import Linear as IA3Linear
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.oft import Linear as OFTLinear
from torch import nn

from ..dense.experts import parameters_of
from ..errors import UnsupportedError
from ..nn.experts import PackedExperts

NO_MERGE = (
    "an adapter cannot be merged into a packed weight without quantizing it again: keep the adapter beside the model, "
    "or merge it into the dense model and pack that"
)
# What LoRA can start from without reading or changing the weight that it stands beside.
INITS = (True, False, "gaussian", "eva", "orthogonal")
# Fields of LoraConfig for variants that need the weight -> what they need it for.
NEED_THE_WEIGHT = {
    "use_dora": "DoRA needs the norms of rows of the weight",
    "kasa_config": "KaSA takes a part out of the weight",
}


class PackedAdapter:
    """What is the same for every adapter beside a packed layer; comes before peft's class of the method."""

    get_base_layer: Callable[[], Any]

    @property
    def weight(self) -> torch.Tensor:
        """The packed layer's stand-in. peft would give `qweight`, to whose dtype some models cast their activations."""
        stand_in: torch.Tensor = self.get_base_layer().weight
        return stand_in

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises UnsupportedError."""
        raise UnsupportedError(NO_MERGE)


class PackedLora(PackedAdapter, LoraLinear):
    """base(x) + scaling * B(A(dropout(x)))."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, *args: Any, config: LoraConfig, **options: Any) -> None:
        """As peft's. Raises UnsupportedError for a kind of LoRA that reads or changes the weight."""
        _check_kind(config)
        super().update_layer(adapter_name, *args, config=config, **options)


class PackedIA3(PackedAdapter, IA3Linear):
    """scale * base(x), or base(scale * x) in a feed-forward."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: IA3Config, is_feedforward: bool = False, **options: Any
    ) -> None:
        # Not peft's own: that one takes the shape from layers of classes that it knows.
        nn.Module.__init__(self)
        self.base_layer, self.is_feedforward = base_layer, is_feedforward
        self.ia3_l = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        base = self.get_base_layer()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.fan_in_fan_out, self.is_target_conv_1d_layer = config.fan_in_fan_out, False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config)


class PackedOFT(PackedAdapter, OFTLinear):
    """base(R(x)), R orthogonal."""

    def __init__(self, *args: Any, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # of a class that is not peft's
            super().__init__(*args, **options)


class PackedExpertsLora(PackedAdapter, ParamWrapper):
    """LoRA of one of the two weights of packed experts: W[e] x + scaling * B[e] (A[e] x).

    peft adds B A to the parameter while the experts run; here their layer is told what to add to its product.
    """

    def update_layer(self, adapter_name: str, *args: Any, config: LoraConfig, **options: Any) -> None:
        """As peft's. Raises UnsupportedError for a kind of LoRA that reads or changes the weight."""
        _check_kind(config)
        super().update_layer(adapter_name, *args, config=config, **options)

    def get_param(self) -> torch.Tensor:
        """A stand-in for the parameter that was packed, with its shape, dtype and device."""
        experts: PackedExperts = self.get_base_layer()
        return experts.stand_in(self._leaf)

    @property
    def _leaf(self) -> str:
        names = parameters_of(self.get_base_layer().family)
        return next(leaf for leaf, name in names.items() if name == self.parameter_name)

    @contextmanager
    def _activate_lora(self, active_adapters: Sequence[str]) -> Iterator[None]:
        adapters = [name for name in active_adapters if name in self.lora_A]
        deltas = self.get_base_layer().deltas
        if adapters:
            deltas[self._leaf] = partial(self._delta, adapters)
        try:
            yield
        finally:
            deltas.pop(self._leaf, None)

    def _delta(self, adapters: Sequence[str], x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """x: (T, K), sorted by expert. offsets: as GroupedLinear. Returns (T, N) in x.dtype."""
        counts = offsets.diff().tolist()
        total: Any = 0
        for name in adapters:
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            # peft's arrangement: A [experts * r, K], expert by expert; B [N, r * experts], the expert changing fastest.
            a = a.reshape(self.num_experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)
            parts = x.to(a.dtype).split(counts)
            products = [(part @ a[e].T) @ b[e].T for e, part in enumerate(parts) if len(part)]
            total = total + torch.cat(products or [x.new_zeros(0, b.shape[1])]) * self.scaling[name]
        made: torch.Tensor = total.to(x.dtype)
        return made


def _check_kind(config: LoraConfig) -> None:
    """Raise UnsupportedError for a kind of LoRA that reads or changes the weight."""
    for field, why in NEED_THE_WEIGHT.items():
        if getattr(config, field, None):
            raise UnsupportedError(f"{why}, which a packed layer does not give: leave {field} out")
    if config.init_lora_weights not in INITS:
        raise UnsupportedError(
            f"init_lora_weights={config.init_lora_weights!r} starts from the values of the weight, which a packed "
            f"layer does not give: choose one of {', '.join(map(repr, INITS))}"
        )
