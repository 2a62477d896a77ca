"""Cycles of one block on one multiprocessor: its warps' instructions through four schedulers.

    warp: stall of the instruction before | scoreboards | copies (DEPBAR) | barrier | code in L0?  -> may issue at
    scheduler: one instruction a cycle; the warp that issued last goes first, then the oldest     -> issues at
    pipes of the scheduler, shared memory and memory of the multiprocessor: busy until            -> later ones wait

Memory: each copy of weights takes its bytes at the multiprocessor's share of the bandwidth, one after the other, and
arrives `dram` cycles later at the earliest. Everything else that is read hits L2. Shared memory: 128 bytes a cycle,
without bank conflicts.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.gpu.model.emulator import Entry
from benchmarks.gpu.model.machines import Machine
from benchmarks.gpu.model.program import Program, Step

SCHEDULERS = 4
# Addresses of the launches that the model makes up (problem.py): what is read from memory, and how many lanes of a warp
# read different bytes.
WEIGHTS = range(0x1_0000_0000, 0x4_0000_0000)
SCALES_FROM = 0x2_0000_0000  # a copy of scales: `scale_lanes` lanes read different bytes
FAR = 1 << 62


@dataclass
class Run:
    """What came out. `waited[phase][reason]`: cycles, all warps together; `issued[phase]`: instructions."""

    cycles: int = 0
    instructions: int = 0
    waited: dict[str, Counter[str]] = field(default_factory=dict)
    issued: Counter[str] = field(default_factory=Counter)
    busy: dict[str, float] = field(
        default_factory=lambda: defaultdict(float)
    )  # cycles of each pipe, four schedulers together
    code_misses: int = 0
    finished: list[int] = field(default_factory=list)  # by warp


class Code:
    """L0 caches of the schedulers over the multiprocessor's cache: when may an instruction be decoded? A cache has for
    each of its lines the cycle from which it is there."""

    def __init__(self, machine: Machine, cold: bool):
        self._machine = machine
        self._l0: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(SCHEDULERS)]
        self._l1: OrderedDict[int, int] | None = OrderedDict() if cold else None
        self.misses = 0

    def there(self, scheduler: int, line: int, before: int, cycle: int) -> int:
        """Cycle from which the line is there, for a warp that wants it at `cycle` and comes from the line `before`."""
        cache = self._l0[scheduler]
        if line in cache:
            cache.move_to_end(line)
            return cache[line]
        near = self._near(line, cycle)
        follows = line == before + 1 and near <= cycle
        self.misses += not follows
        self._keep(
            cache, line, cycle if follows else max(near, cycle + self._machine.code_l0_miss), self._machine.code_l0
        )
        return cache[line]

    def _near(self, line: int, cycle: int) -> int:
        """Cycle from which the multiprocessor's cache has the line."""
        if self._l1 is None:
            return 0
        there = self._l1.get(line, cycle + self._machine.code_l1_miss)
        self._keep(self._l1, line, there, self._machine.code_l1)
        return there

    def _keep(self, cache: OrderedDict[int, int], line: int, there: int, size: int) -> None:
        cache[line] = there
        cache.move_to_end(line)
        if len(cache) > size // self._machine.code_line:
            cache.popitem(last=False)


class Warp:
    """Where a warp is, and what it waits for."""

    def __init__(self, trace: list[Entry]):
        self.trace = trace
        self.place = 0
        self.last = 0  # cycle of its last issue
        self.stall = 0  # until this cycle, by the last instruction
        self.scoreboards = [0] * 6
        self.producers = [""] * 6
        self.copies: list[float] = []  # arrival of each group of copies
        self.open_group = 0.0
        self.at_barrier = False
        self.released = 0
        self.line = -2
        self.ready = 0
        self.reasons: list[tuple[int, str]] = []


class Multiprocessor:
    """State of one run."""

    def __init__(self, program: Program, traces: Sequence[list[Entry]], machine: Machine, share: float,
                 phases: Sequence[str], cold: bool, scale_lanes: int):  # fmt: skip
        self.scale_lanes, self.scales_seen = scale_lanes, set[int]()
        self.program, self.machine, self.phases = program, machine, phases
        self.bytes_per_cycle = share / machine.clock
        self.warps = [Warp(t) for t in traces]
        self.run = Run()
        self.code = Code(machine, cold)
        self.pipes: list[dict[str, float]] = [dict.fromkeys(machine.pipes, 0) for _ in range(SCHEDULERS)]
        self.last_issue = [-1] * SCHEDULERS
        self.last_warp: list[Warp | None] = [None] * SCHEDULERS
        self.shared_free = self.memory_free = 0.0
        self.live = len(self.warps)

    def simulate(self) -> Run:
        """To the end of the last warp."""
        for w in range(len(self.warps)):
            self._look_ahead(w)
        plans = [self._plan(s) for s in range(SCHEDULERS)]
        while self.live:
            s = min(range(SCHEDULERS), key=lambda k: plans[k][0])
            cycle, w = plans[s]
            assert w >= 0, "every warp waits at a barrier that another one never reaches"
            if self._next(w).pipe == "memory":  # another scheduler may have filled the queue meanwhile
                plans[s] = self._plan(s)
                if plans[s] != (cycle, w):
                    continue
            released = self._issue(s, w, cycle)
            for k in range(SCHEDULERS):
                if k == s or released:
                    plans[k] = self._plan(k)
        self.run.code_misses = self.code.misses
        self.run.finished = [w.last for w in self.warps]
        return self.run

    def _plan(self, s: int) -> tuple[int, int]:
        """Cycle and warp of the scheduler's next issue."""
        best, chosen = FAR, -1
        pipes, last = self.pipes[s], self.last_warp[s]
        for w in range(s, len(self.warps), SCHEDULERS):
            warp = self.warps[w]
            if warp.at_barrier or warp.place == len(warp.trace):
                continue
            pipe = self._next(w).pipe
            cycle = max(warp.ready, self.last_issue[s] + 1, int(pipes[pipe]) if pipe else 0)
            if pipe == "memory":
                cycle = max(cycle, math.ceil(self.shared_free - self.machine.shared_queue))
            if cycle < best or (cycle == best and warp is last):
                best, chosen = cycle, w
        return best, chosen

    def _look_ahead(self, w: int) -> None:
        """When the warp itself lets its next instruction go: `ready`, with each thing that it waits for."""
        warp = self.warps[w]
        if warp.place == len(warp.trace):
            return
        step = self.program.step(warp.trace[warp.place][0])
        reasons = [(warp.stall, "own instructions")]
        if warp.released:
            reasons.append((warp.released, "other warps"))
            warp.released = 0
        for k in step.wait:
            reasons.append((warp.scoreboards[k], warp.producers[k]))
        if step.latency == "wait" and len(warp.copies) > step.keep:
            waited = warp.copies[: len(warp.copies) - step.keep]
            reasons.append((int(max(waited)), "weights"))
            del warp.copies[: len(waited)]
        line = step.line // self.machine.code_line
        if line != warp.line:
            cycle = max(r for r, _ in reasons)
            reasons.append((self.code.there(w % SCHEDULERS, line, warp.line, cycle), "code"))
            warp.line = line
        warp.ready = max(r for r, _ in reasons)
        warp.reasons = reasons

    def _next(self, w: int) -> Step:
        warp = self.warps[w]
        return self.program.step(warp.trace[warp.place][0])

    def _issue(self, s: int, w: int, cycle: int) -> bool:
        """Issues the warp's next instruction; true where a barrier opened."""
        warp = self.warps[w]
        n, taken, address = warp.trace[warp.place]
        step = self.program.step(n)
        self._account(warp, self.phases[n], cycle, step.pipe, self.pipes[s].get(step.pipe, 0))
        self.last_issue[s], self.last_warp[s] = cycle, warp
        if step.pipe:
            busy = self.machine.pipes[step.pipe]
            self.pipes[s][step.pipe] = cycle + busy
            self.run.busy[step.pipe] += busy
        latency = self._latency(warp, step, cycle, taken, address)
        if step.write < 6:
            warp.scoreboards[step.write] = max(warp.scoreboards[step.write], cycle + int(latency))
            warp.producers[step.write] = REASONS.get(step.latency, "own instructions")
        if step.read < 6:
            done = cycle + self.machine.latency["read"]
            if done > warp.scoreboards[step.read]:
                warp.scoreboards[step.read], warp.producers[step.read] = done, "own instructions"
        warp.last = cycle
        warp.stall = cycle + max(step.stall, int(latency) if step.latency == "fence" else 0)
        warp.place += 1
        finished = warp.place == len(warp.trace)
        if finished:
            self.live -= 1
            self.run.cycles = max(self.run.cycles, cycle)
        warp.at_barrier = step.latency == "barrier" and taken
        if not warp.at_barrier:
            self._look_ahead(w)
        return (warp.at_barrier or finished) and self._open_barrier(cycle)

    def _open_barrier(self, cycle: int) -> bool:
        live = [k for k, v in enumerate(self.warps) if v.place < len(v.trace)]
        if not live or not all(self.warps[k].at_barrier for k in live):
            return False
        for k in live:
            self.warps[k].at_barrier = False
            self.warps[k].released = cycle + self.machine.latency["barrier"]
            self._look_ahead(k)
        return True

    def _latency(self, warp: Warp, step: Step, cycle: int, taken: bool, address: int) -> float:
        """Cycles until the result is there; occupies shared memory and memory."""
        table = self.machine.latency
        if step.latency == "arrive":
            warp.copies.append(max(warp.open_group, cycle))
            warp.open_group = 0.0
        if step.latency in ("arrive", "wait", "barrier") or not taken:
            return table["other"]
        if step.pipe == "memory" and step.latency in ("shared", "matrix", "copy", "l2"):
            # A copy passes twice: addresses out, data in.
            bytes_moved = 32 * step.bytes * (2 if step.latency == "copy" else 1)
            begin = max(self.shared_free, cycle)
            self.shared_free = begin + bytes_moved / self.machine.shared_rate
            self.run.busy["shared memory"] += bytes_moved / self.machine.shared_rate
            if step.latency == "copy":
                warp.open_group = max(warp.open_group, self._arrival(cycle, step.bytes, address))
                return table["read"]
            return table[step.latency] + begin - cycle
        return max(table[step.latency], table["other"])

    def _arrival(self, cycle: int, lane_bytes: int, address: int) -> float:
        """When what was asked for is in shared memory."""
        if address not in WEIGHTS:
            return cycle + self.machine.latency["l2"]
        if address >= SCALES_FROM:  # where a group is wider than a unit, the later ones find its scales in L2
            if address in self.scales_seen:
                return cycle + self.machine.latency["l2"]
            self.scales_seen.add(address)
        lanes = 32 if address < SCALES_FROM else self.scale_lanes
        self.memory_free = max(self.memory_free, cycle) + lane_bytes * lanes / self.bytes_per_cycle
        return self.memory_free + self.machine.latency["dram"]

    def _account(self, warp: Warp, phase: str, cycle: int, pipe: str, pipe_free: float) -> None:
        """Shares the cycles since the warp's last issue out among what it waited for, in this order: what the warp
        needs, the pipe, a slot of the scheduler."""
        self.run.instructions += 1
        self.run.issued[phase] += 1
        waited = self.run.waited.setdefault(phase, Counter())
        at = warp.last
        for until, reason in [*warp.reasons, (int(pipe_free), f"{pipe} pipe")]:
            if until > at:
                waited[reason] += min(until, cycle) - at
                at = min(until, cycle)
        if cycle > at:
            waited["issue slots"] += cycle - at


# What a warp waits for, by the class of the instruction that makes it.
REASONS = {
    "shared": "shared memory", "matrix": "shared memory", "l2": "L2", "store": "L2", "atomic": "fences and atomics",
    "fence": "fences and atomics", "constant": "constants",
}  # fmt: skip


def simulate(program: Program, traces: Sequence[list[Entry]], machine: Machine, share: float | None = None,
             phases: Sequence[str] | None = None, cold: bool = False, scale_lanes: int = 8) -> Run:  # fmt: skip
    """Runs the warps of a block. share: bytes/s of the memory for this block, an equal part unless told. phases: a name
    for each instruction. cold: no code is in the multiprocessor's cache yet.
    scale_lanes: lanes of a copy of scales that read different bytes."""
    share = machine.bandwidth / machine.multiprocessors if share is None else share
    names = [""] * len(program.instructions) if phases is None else phases
    return Multiprocessor(program, traces, machine, share, names, cold, scale_lanes).simulate()
