"""Modelled times of a product: a block in the middle of the grid, and the same block where it also adds the sums of the
others, which is when the kernel ends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.gpu.model.cubins import Code, read_code
from benchmarks.gpu.model.emulator import Launch
from benchmarks.gpu.model.machines import GRAPH_NODE_US, Machine
from benchmarks.gpu.model.pipeline import Run, simulate
from benchmarks.gpu.model.problem import COUNTERS, Plan, Problem, prepare
from benchmarks.gpu.sass_files import list_codes

LIBRARY = Path(__file__).resolve().parents[3] / "mpq_kernels" / "_cuda.so"


@cache
def kernel(library: Path, name: str, arch: int) -> Code:
    """A kernel, disassembled once: the code that a device of `arch` would run, the newest of its own generation."""
    held = [a for a in list_codes(library)[0] if a // 10 == arch // 10 and a <= arch]
    return read_code(library, name, max(held, default=arch))


@dataclass(frozen=True)
class Figure:
    """What the model says of one product on one machine."""

    problem: Problem
    machine: Machine
    plan: Plan
    block: int  # the one that was run
    middle: Run  # a block that is the last to arrive nowhere
    last: Run  # the same block, last in the row group that it ends with
    arrange: Run | None  # x arranged before it, where the product is of many tokens

    @property
    def cycles(self) -> int:
        """Of the kernels' bodies."""
        waves = -(-self.plan.grid[0] * self.plan.grid[1] // self.machine.multiprocessors)
        return waves * self.last.cycles + (self.arrange.cycles if self.arrange else 0)

    @property
    def body_us(self) -> float:
        """us of the kernels' bodies."""
        return self.cycles / self.machine.clock * 1e6

    @property
    def us(self) -> float:
        """us with the steps from kernel to kernel in a graph."""
        return self.body_us + GRAPH_NODE_US * (2 if self.arrange else 1)

    @property
    def floor_us(self) -> float:
        """us in which memory delivers the weight's bytes."""
        return self.problem.layout.size().total_bytes / self.machine.bandwidth * 1e6

    @property
    def fraction_of_floor(self) -> float:
        """1: nothing but reading the weight."""
        return self.floor_us / self.us

    @property
    def instructions_per_weight(self) -> float:
        """That a lane issues, of the middle block, for each weight of its share."""
        layout = self.problem.layout
        weights = -(-layout.out_features // 64) * -(-layout.in_features // 64) * 64 * 64
        return self.middle.instructions * 32 / (weights / self.plan.grid[0])


def memory_share(plan: Plan, machine: Machine) -> float:
    """bytes/s for one block. Blocks of other tokens read the same weights, so that the bytes of all but one come from
    L2; the blocks of a wave share both bandwidths equally."""
    blocks = min(plan.grid[0] * plan.grid[1], machine.multiprocessors)
    together = min(plan.grid[1], max(1, machine.multiprocessors // plan.grid[0]))
    return min(machine.bandwidth * together, max(machine.bandwidth, machine.l2_bandwidth)) / blocks


def launch_of(plan: Plan, machine: Machine, code: Code, block: int, last: bool) -> Launch:
    """One block of the plan's launch. last: it finds that all others of the row group that it ends with are done."""
    cut = plan.cuts[block + 1] if plan.shares_last_group(block) else plan.cuts[block]
    counter = COUNTERS + 4 * cut.first

    def arrived(address: int, _: int) -> int:
        return cut.last - cut.first if last and address == counter else 0

    return Launch(plan.params, machine.params_at, (block, 0), plan.grid, plan.warps, code.constants, atomic=arrived)


def figure(problem: Problem, machine: Machine, library: Path = LIBRARY, cold: bool = False) -> Figure:
    """Runs the model. cold: the kernel's code is in no instruction cache but L2 yet. A weight of several widths: the
    slowest of the blocks that stand for its widths."""
    plan = prepare(problem, machine)
    code = kernel(library, plan.kernel, machine.arch)
    share = memory_share(plan, machine)

    # decode_kernel copies the 64 bytes of a group's zeros by the instruction that copies its scales, fp16.
    def run(block: int, last: bool) -> Run:
        traces = code.emulator.run(launch_of(plan, machine, code, block, last))
        return simulate(code.program, traces, machine, share, code.phases, cold, 12 if plan.side else 8)

    last, block = max(((run(b, True), b) for b in plan.representatives(problem.layout)), key=lambda r: r[0].cycles)
    return Figure(problem, machine, plan, block, run(block, False), last, arrange(problem, plan, machine, library))


def arrange(problem: Problem, plan: Plan, machine: Machine, library: Path) -> Run | None:
    """The kernel before a product of many tokens: all of its blocks at once, as few as they are."""
    if plan.arrange_kernel is None:
        return None
    code = kernel(library, plan.arrange_kernel, machine.arch)
    grid = (-(-problem.layout.in_features // 64), plan.grid[1])
    launch = Launch(plan.arrange_params, machine.params_at, (grid[0] // 2, 0), grid, 8, code.constants)
    return simulate(code.program, code.emulator.run(launch), machine, machine.bandwidth / machine.multiprocessors)
