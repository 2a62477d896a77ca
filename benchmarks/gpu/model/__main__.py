"""python -m benchmarks.gpu.model: modelled times of the kernels of mpq_linear, or of a peer's cubin."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.model.figures import LIBRARY, Figure, figure
from benchmarks.gpu.model.machines import GRAPH_NODE_US, MACHINES, Machine
from benchmarks.gpu.model.peer import PeerFigure, PeerLaunch, peer_figure
from benchmarks.gpu.model.pipeline import Run
from benchmarks.gpu.model.problem import Problem, ProblemError
from benchmarks.gpu.sass import SassError
from benchmarks.gpu.sass_files import find_tool
from benchmarks.layers.shapes import SHAPES, add_shape

NOTICE = (
    "Modelled from machine code, not measured. us: kernel body; + node: with {} us from kernel to kernel in a graph."
)


def arguments() -> argparse.ArgumentParser:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu.model", description=__doc__)
    p.add_argument(
        "--shape", default="8192x8192", help="NxK or a name of benchmarks/layers/shapes.py; several with ','"
    )
    p.add_argument("--bits", default="4", help='widths, several with ","; "4|3|8" for a shape of three members')
    p.add_argument("--segments", help="the same as --bits, for shapes of several members")
    p.add_argument("--tokens", default="1", help="M, several with ','")
    p.add_argument("--group", type=int, default=128, help="columns that share a scale")
    p.add_argument("--bf16", action="store_true", help="x in bf16; fp16 without it")
    p.add_argument("--machine", choices=MACHINES, default="h200")
    p.add_argument("--bandwidth", type=float, help="TB/s instead of the machine's")
    p.add_argument("--assume", help='other cycles than those of machines.py: "dram=900,atomic=700,tensor=6.5"')
    p.add_argument(
        "--cold-code", action="store_true", help="no instruction of the kernel is in a cache of the multiprocessor"
    )
    p.add_argument("--library", type=Path, default=LIBRARY)
    p.add_argument("--json", action="store_true", help="figures as JSON, a list where there are several")
    peer = p.add_argument_group("kernel of another program (peer.py)")
    peer.add_argument("--cubin", type=Path)
    peer.add_argument("--kernel", help="part of its symbol")
    peer.add_argument("--params", help='format and values: "QQi:0x100000000,0x400000000,1"')
    peer.add_argument("--grid", type=int, default=132)
    peer.add_argument("--threads", type=int, default=256)
    peer.add_argument("--block", type=int, default=66)
    peer.add_argument("--bytes", type=float, default=0, help="of the weight, for the floor")
    peer.add_argument(
        "--scale-lanes", type=int, default=8, help="lanes of a copy of scales that read different bytes; 12: and zeros"
    )
    return p


def assumed(machine: Machine, text: str | None) -> Machine:
    """With other latencies and rates of pipes."""
    pipes, latency = dict(machine.pipes), dict(machine.latency)
    for pair in text.split(",") if text else ():
        name, _, value = pair.partition("=")
        if name in pipes:
            pipes[name] = float(value)
        elif name in latency:
            latency[name] = int(value)
        else:
            sys.exit(f"--assume: {name} is none of {', '.join([*pipes, *latency])}")
    return replace(machine, pipes=pipes, latency=latency)


def phase_lines(run: Run) -> Iterator[str]:
    """What each phase takes, as the mean over warps, and what bounds it."""
    warps = len(run.finished)
    yield f"  {'phase':<16}{'cycles':>8}{'share':>7}{'instructions':>14}  waiting for"
    for phase, waited in run.waited.items():
        cycles = sum(waited.values()) / warps
        top = ", ".join(f"{reason} {n / warps / cycles:.0%}" for reason, n in waited.most_common(3)) if cycles else ""
        yield f"  {phase:<16}{cycles:>8.0f}{cycles / run.cycles:>7.0%}{run.issued[phase]:>14}  {top}"
    idle = run.cycles - sum(run.finished) / warps
    yield f"  {'after its exit':<16}{idle:>8.0f}{idle / run.cycles:>7.0%}"
    most = sorted(run.busy.items(), key=lambda item: -item[1])[:5]
    busy = {name: n / run.cycles / (1 if name == "shared memory" else 4) for name, n in most}
    yield "  busy: " + ", ".join(f"{name} {share:.0%}" for name, share in busy.items())


def json_of(f: Figure) -> dict[str, Any]:
    """Figures of one product."""
    return {
        "shape": f.problem.shape, "bits": f.problem.bits, "tokens": f.problem.tokens, "modelled": True,
        "us": round(f.us, 2), "body_us": round(f.body_us, 2), "cycles": f.cycles, "middle_cycles": f.middle.cycles,
        "floor_us": round(f.floor_us, 2), "fraction_of_floor": round(f.fraction_of_floor, 3),
        "instructions_per_weight": round(f.instructions_per_weight, 3), "grid": f.plan.grid, "block": f.block,
    }  # fmt: skip


HEAD = ("shape", "bits", "M", "blocks", "middle us", "us", "+ node", "floor us", "of floor", "instr/weight")


def table_row(f: Figure) -> tuple[str, ...]:
    """Cells under HEAD."""
    middle = f.middle.cycles / f.machine.clock * 1e6
    return (f.problem.shape, f.problem.bits, str(f.problem.tokens), "x".join(map(str, f.plan.grid)), f"{middle:.1f}",
            f"{f.body_us:.1f}", f"{f.us:.1f}", f"{f.floor_us:.1f}", f"{f.fraction_of_floor:.0%}",
            f"{f.instructions_per_weight:.2f}")  # fmt: skip


def line(cells: tuple[str, ...]) -> str:
    """Cells in columns."""
    return f"{cells[0]:<18}{cells[1]:>8}" + "".join(f"{c:>13}" if len(h) > 6 else f"{c:>8}"
                                                    for h, c in zip(HEAD[2:], cells[2:], strict=True))  # fmt: skip


def report_peer(args: argparse.Namespace, machine: Machine) -> None:
    """One block of another program's kernel."""
    launch = PeerLaunch(args.params, args.grid, args.threads, args.block)
    f: PeerFigure = peer_figure(args.cubin, args.kernel, launch, machine, args.bytes, args.scale_lanes)
    if args.json:
        figures = {"modelled": True, "us": round(f.us, 2), "body_us": round(f.body_us, 2), "cycles": f.run.cycles,
                   "fraction_of_floor": round(f.floor_us / f.us, 3)}  # fmt: skip
        print(json.dumps(figures))
        return
    print(f"{args.kernel}: {f.body_us:.1f} us, {f.us:.1f} us with the node, {f.floor_us / f.us:.0%} of the floor")
    print("\n".join(phase_lines(f.run)))


def report(args: argparse.Namespace, machine: Machine) -> None:
    """Products: one in detail, or a table."""
    shapes = args.shape.split(",")
    for shape in shapes:
        if not add_shape(shape) or shape not in SHAPES:
            raise ProblemError(f"{shape} is neither NxK nor one of {', '.join(SHAPES)}")
    widths = (args.segments or args.bits).split(",")
    problems = [
        Problem(s, b, int(m), args.group, args.bf16) for s in shapes for b in widths for m in args.tokens.split(",")
    ]
    if args.json:
        found = [json_of(figure(p, machine, args.library, args.cold_code)) for p in problems]
        print(json.dumps(found[0] if len(found) == 1 else found))
        return
    print(line(HEAD))
    for p in problems:
        f = figure(p, machine, args.library, args.cold_code)
        print(line(table_row(f)), flush=True)
        if len(problems) == 1:
            for title, run in (("a middle block", f.middle), ("the same block, adding the sums of others", f.last)):
                print(
                    f"\n{title}: {run.cycles} cycles, {run.instructions} instructions, {run.code_misses} misses of code"
                )
                print("\n".join(phase_lines(run)))
    print("\n" + NOTICE.format(GRAPH_NODE_US))


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    args = arguments().parse_args(words)
    machine = assumed(MACHINES[args.machine], args.assume)
    if args.bandwidth:
        machine = replace(machine, bandwidth=args.bandwidth * 1e12)
    missing = [tool for tool in ("cuobjdump", "nvdisasm") if not find_tool(tool)]
    if missing or not (args.cubin or args.library).exists():
        sys.exit(
            f"{args.cubin or args.library} does not exist" if not missing else f"no {missing[0]}: pip install triton"
        )
    try:
        if args.cubin:
            report_peer(args, machine)
        else:
            report(args, machine)
    except (ProblemError, SassError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
