"""The model on a kernel of another program: a cubin for the same machine, and parameters by hand.

    python -m benchmarks.gpu.model --cubin marlin.sm_90.cubin --kernel Marlin --grid 132 --threads 256 --block 66 \\
        --params QQQQiiiiQ:0x400000000,0x100000000,0x500000000,0x200000000,1,8192,8192,0,0x600000000 --bytes 34603008

Addresses from 1 << 32 below 4 << 32 are weights, read from memory; those from 2 << 32 on are scales, of which four
lanes each read the same. Words from 6 << 32 on are locks: each load of one finds one more, modulo 4, so that a loop
that waits for its turn ends.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from benchmarks.gpu.model.cubins import read_code
from benchmarks.gpu.model.emulator import Launch
from benchmarks.gpu.model.machines import GRAPH_NODE_US, Machine
from benchmarks.gpu.model.pipeline import Run, simulate

LOCKS = range(6 << 32, 7 << 32)


@dataclass(frozen=True)
class PeerLaunch:
    """One block of a launch. params: format of the struct module, then values, as in "Qi:0x100000000,1"."""

    params: str
    grid: int
    threads: int
    block: int

    @property
    def packed(self) -> bytes:
        """Parameters as the kernel finds them."""
        form, _, values = self.params.partition(":")
        return struct.pack(f"@{form}", *(int(v, 0) for v in values.split(",")))


@dataclass(frozen=True)
class PeerFigure:
    """What the model says of that block."""

    run: Run
    machine: Machine
    floor_us: float

    @property
    def body_us(self) -> float:
        """us of the block."""
        return self.run.cycles / self.machine.clock * 1e6

    @property
    def us(self) -> float:
        """us with the step from kernel to kernel in a graph."""
        return self.body_us + GRAPH_NODE_US


def peer_figure(
    cubin: Path, kernel: str, launch: PeerLaunch, machine: Machine, weight_bytes: float, scale_lanes: int = 8
) -> PeerFigure:
    """Runs the model. weight_bytes: for the floor. scale_lanes: as in `simulate`."""
    code = read_code(cubin, kernel, machine.arch)
    turns = count()

    def load(address: int) -> int:
        return next(turns) % 4 if address in LOCKS else 0

    made = Launch(launch.packed, machine.params_at, (launch.block, 0), (launch.grid, 1), launch.threads // 32,
                  code.constants, load=load)  # fmt: skip
    share = machine.bandwidth / min(launch.grid, machine.multiprocessors)
    run = simulate(code.program, code.emulator.run(made), machine, share, code.phases, scale_lanes=scale_lanes)
    return PeerFigure(run, machine, weight_bytes / machine.bandwidth * 1e6)
