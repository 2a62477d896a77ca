"""One bit more and one bit less for column groups of a linear against one width for all of it.

    python -m benchmarks.reproductions.group_widths MODEL --text FILE --calibration FILE --out results.json

Claim (SliM-LLM, https://arxiv.org/abs/2405.14917): with the salience of a group, the sum of w^2 / [H^-1]_jj^2 over its
rows and columns, the lowest i groups at N-1 bits and the highest i at N+1 lose less than N bits everywhere, i chosen by
KL(softmax(X Wq^T) || softmax(X W^T)). The number of bits stays N on average. Groups are column segments of the packed
format, 1 bit among them, so stored bytes are real; scales are those of --group-size columns (64, since K is 128 to 640
here, against 128 in the paper). Measured with --quantizer and with the package's GPTQ; 1 bit is sign times scale.

    slim       i from 1 to groups / 2 - 1, at least 1     slim or 0   also no change at all
    error      i by the output error, 0 allowed           random      the i of `slim`, groups drawn at random
    reverse    the i of `slim`, N-1 for the most salient  fisher      {N-1, N, N+1} for all groups of the model together
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from benchmarks.allocation.reproductions.common import Experiment, compare, parser, solve
from mpq_kernels.allocate import Unit, make_choices, make_plan, make_units
from mpq_kernels.allocate.methods import DAMPING, METHODS
from mpq_kernels.allocate.predicted import output_error
from mpq_kernels.allocate.study import Study
from mpq_kernels.calibrate.hessians import damped

OUTPUT_TOKENS = 1024  # of which the outputs are compared by KL


def inputs_of(study: Study, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every linear reads of a batch: fp32 [tokens, K]."""
    found: dict[str, torch.Tensor] = {}
    handles = []
    for unit in study.units:
        name = unit.cells[0].spec.name

        def see(module: torch.nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            found[name] = args[0].flatten(0, 1).float()

        handles.append(study.model.get_submodule(name).register_forward_pre_hook(see))
    study.model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


class Groups:
    """The groups of one linear: their indexes among the units, least salient first, and how a choice of i is judged."""

    def __init__(self, study: Study, units: Sequence[Unit], members: Sequence[int], x: torch.Tensor) -> None:
        self.study, self.units, self.x = study, units, x
        name = units[members[0]].cells[0].spec.name
        self.weight, self.moments = study.dense[name].float(), study.inputs.moments[name]
        inverse = torch.linalg.inv(damped(self.moments.clone(), DAMPING).double())
        salience = (self.weight.double().square() / inverse.diagonal().square()).sum(0)
        self.order = sorted(members, key=lambda i: float(salience[units[i].cells[0].k0 : units[i].cells[0].k1].sum()))

    def picks(self, count: int, order: Sequence[int]) -> dict[int, int]:
        """Place among the choices (N-1, N, N+1) of each group."""
        last = len(order) - count
        return {unit: 0 if rank < count else 2 if rank >= last else 1 for rank, unit in enumerate(order)}

    def values(self, count: int) -> torch.Tensor:
        """The weight with `count` groups on either side."""
        out = self.weight.clone()
        for unit, place in self.picks(count, self.order).items():
            cell = self.units[unit].cells[0]
            out[:, cell.k0 : cell.k1] = self.study.candidate(cell, self.units[unit].choices[place])
        return out

    def divergence(self, count: int) -> float:
        """SliM-LLM's criterion."""
        one, other = ((self.x @ w.T).log_softmax(-1) for w in (self.values(count), self.weight))
        return float((one.exp() * (one - other)).sum(-1).mean())

    def error(self, count: int) -> float:
        """Mean squared error of the output."""
        return output_error(self.values(count) - self.weight, self.moments)

    def best(self, judge: Callable[[int], float], least: int) -> int:
        """The count that is judged lowest."""
        return min(range(least, max(1, len(self.order) // 2 - 1) + 1), key=judge)


def assign(groups: Sequence[Groups], rule: str, seed: int) -> tuple[list[int], list[int]]:
    """(a pick for every unit, the counts) by one of the rules in the table."""
    picks: dict[int, int] = {}
    counts = []
    for index, group in enumerate(groups):
        judge = group.error if rule == "error" else group.divergence
        counts.append(group.best(judge, 0 if rule in ("slim or 0", "error") else 1))
        order = list(group.order)
        if rule.startswith("random"):
            random.Random(seed * 1000 + index).shuffle(order)
        picks |= group.picks(counts[-1], order[::-1] if rule == "reverse" else order)
    return [picks[unit] for unit in sorted(picks)], counts


def main() -> None:
    """Measure what is missing, print the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--bits", default="2,3")
    arguments.add_argument("--group-size", type=int, default=64, help="a multiple of 64, the side of a supertile")
    args = arguments.parse_args()
    widths = [int(value) for value in args.bits.split(",")]
    palette = make_choices(range(min(widths) - 1, max(widths) + 2), [args.group_size])
    experiment = Experiment(args, palette, group_size=args.group_size, bits=args.bits)
    linears, tokens = experiment.linears, experiment.calibration
    x = inputs_of(experiment.study, tokens[: max(1, OUTPUT_TOKENS // tokens.shape[1])])
    for bits in widths:
        choices = make_choices([bits - 1, bits, bits + 1], [args.group_size])
        units = list(make_units(linears, "column", choices, span=args.group_size))
        study = Study(experiment.model, linears, units, tokens, args.quantizer)
        members: dict[str, list[int]] = {}
        for index, unit in enumerate(units):
            members.setdefault(unit.cells[0].spec.name, []).append(index)
        groups = [Groups(study, units, found, x[name]) for name, found in members.items()]
        rules = ["uniform", "slim", "slim or 0", "error", "reverse", *(f"random {seed}" for seed in range(3)), "fisher"]
        for seed, rule in enumerate(rules):
            if rule == "uniform":
                picks = [1] * len(units)
            elif rule == "fisher":
                size = experiment.results.get(f"{bits} uniform")["bytes"]
                picks = list(solve(units, METHODS["fisher"].run(study), size)[0])
            else:
                picks, counts = assign(groups, rule, args.seed + seed)
                experiment.results.put(f"{bits} {rule} counts", counts)
            plan = make_plan(linears, units, picks)
            for name, measure in (("", experiment.point), (" gptq", experiment.gptq_point)):
                point = measure(f"{bits} {rule}{name}", plan)
                flat = experiment.results.get(f"{bits} uniform{name}")
                print(
                    bits, rule, name, f"bpw {point['bpw']}, ppl {point['ppl']:.3f}, {compare(point, flat)}", flush=True
                )


if __name__ == "__main__":
    main()
