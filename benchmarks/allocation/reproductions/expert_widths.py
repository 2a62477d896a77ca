"""Widths for single experts against one width for all, at equal bytes, on a mixture trained here.

    python -m benchmarks.reproductions.expert_widths --out results.json [--text FILE] [--seeds 0,1,2] [--steps 300]

Claim: experts that are routed to often and weigh much deserve more bits (MC-MoE, https://arxiv.org/abs/2410.06270).
A Mixtral of 2 layers and 8 experts, two of them for each token, learns the bytes of a text; the loss that balances the
load is off, as it is by default. Attention has 4 bits in all plans. Plans are packed and run as packed models.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.allocation.reproductions.common import (
    described,
    difference,
    open_results,
    summary,
    window_losses,
    without_windows,
)
from mpq_kernels import Plan, replace_linears
from mpq_kernels.allocate import Budget, Unit, allocate, make_choices, make_plan, make_units
from mpq_kernels.allocate.methods import METHODS
from mpq_kernels.allocate.study import Study
from mpq_kernels.allocate.units import Limits
from mpq_kernels.dense.names import list_linears

ROOT = Path(__file__).parents[3]
WINDOW, BATCH, GROUP, ATTENTION_BITS = 64, 16, 32, 4
HELD_OUT = 65536  # bytes at the end of the text
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def windows(text: bytes) -> torch.Tensor:
    """Bytes as tokens, int64 [windows, WINDOW]; those beyond ASCII are one token."""
    ids = torch.tensor(list(text)).clamp_(max=127)
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def train(rows: torch.Tensor, steps: int, seed: int, peak: float = 5e-3) -> MixtralForCausalLM:
    """A model that has read `steps` batches of WINDOW tokens from random places of rows [windows, WINDOW]."""
    places = rows.flatten().unfold(0, WINDOW, 1)
    torch.manual_seed(seed)
    model = MixtralForCausalLM(MixtralConfig(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 30) * (1 - s / steps))
    draw = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(steps):
            x = places[torch.randint(0, len(places), (BATCH,), generator=draw)]
            model(input_ids=x, labels=x, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ramp.step()
    return model.eval()


@dataclass
class Mixture:
    """A trained model, its held-out rows, and plans for it."""

    model: Any
    held: torch.Tensor
    study: Study
    units: Sequence[Unit]

    @classmethod
    def of(cls, model: Any, calibration: torch.Tensor, held: torch.Tensor, bits: Sequence[int]) -> Mixture:
        """Units are experts, which may have `bits`, and linears of attention, which have ATTENTION_BITS."""
        linears = list_linears(model)
        limits = Limits(
            least={".*self_attn.*": ATTENTION_BITS}, most={".*self_attn.*": ATTENTION_BITS, ".*experts.*": max(bits)}
        )
        units = make_units(linears, "expert", make_choices([*bits, ATTENTION_BITS], [GROUP]), limits=limits)
        return cls(model, held, Study(model, linears, units, calibration), units)

    def uniform(self, bits: int) -> tuple[Plan, int]:
        """The plan with one width for all experts, and its bytes."""
        picks = [next((i for i, c in enumerate(u.choices) if c.bits == bits), 0) for u in self.units]
        size = sum(unit.bytes[pick] for unit, pick in zip(self.units, picks, strict=True))
        return make_plan(self.study.linears, self.units, picks), size

    def allocated(self, losses: Sequence[Sequence[float]], size: int) -> tuple[Plan, int]:
        """The plan of least loss in so many bytes, and its bytes."""
        got = allocate(self.study.linears, self.units, losses, Budget("bytes", size))
        return got.plan, got.bytes

    def packed_losses(self, plan: Plan) -> torch.Tensor:
        """Mean loss of each held-out window by the packed model."""
        packed = copy.deepcopy(self.model)
        replace_linears(packed, plan, self.study.quantizer)
        return window_losses(packed, self.held)


def backwards(units: Sequence[Unit], losses: Sequence[Sequence[float]]) -> list[list[float]]:
    """Losses in which the experts have changed places: the one that loses most with the one that loses least."""
    out = [list(row) for row in losses]
    experts = [index for index, unit in enumerate(units) if unit.cells[0].spec.expert is not None]
    order = sorted(experts, key=lambda i: losses[i][0])
    for index, other in zip(order, reversed(order), strict=True):
        out[index] = list(losses[other])
    return out


def main() -> None:
    """Train and measure for every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=ROOT / "examples" / "gutenberg_val.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_grad_enabled(False)
    text = args.text.read_bytes()
    rows, held = windows(text[:-HELD_OUT]), windows(text[-HELD_OUT:])
    settings = {"text": described(args.text), "steps": args.steps, "window": WINDOW, "held_out_tokens": held.numel()}
    results = open_results(args.out, settings | {"quantizer": "hqq", "group_size": GROUP, "model": SIZES})
    for seed in [int(value) for value in args.seeds.split(",")]:
        model = train(rows, args.steps, seed)
        dense = summary(window_losses(model, held), None, 1)
        results.put(f"seed {seed} original", without_windows(dense))
        for bits, palette in ((2, (1, 2, 3)), (2, (1, 2, 3, 4)), (3, (1, 2, 3, 4, 5))):
            mixture = Mixture.of(model, rows[:128], held, palette)
            weights = sum(unit.weights for unit in mixture.units)
            plan, size = mixture.uniform(bits)
            name = f"seed {seed} {bits} of {','.join(map(str, palette))}"
            flat = summary(mixture.packed_losses(plan), size, weights)
            results.put(f"{name} uniform", without_windows(flat))
            for method in ("router", "hessian", "measured"):
                losses = METHODS[method].run(mixture.study)
                for word, table in (("", losses), (" backwards", backwards(mixture.units, losses))):
                    plan, stored = mixture.allocated(table, size)
                    point = summary(mixture.packed_losses(plan), stored, weights)
                    gap, error = difference(point, flat)
                    part = (point["nll"] - dense["nll"]) / (flat["nll"] - dense["nll"])
                    more = {"minus_uniform": gap, "minus_uniform_stderr": error, "of_what_uniform_adds": part}
                    results.put(f"{name} {method}{word}", without_windows(point | more))
                    print(f"{name} {method}{word}: {gap:+.4f} +- {error:.4f}, {part:.0%} of uniform's loss", flush=True)


if __name__ == "__main__":
    main()
