"""A product, and its launch as the project's own planner prepares it (plan.cpp, compiled once for each state of it).

Addresses: qweight 1 << 32, scales 2 << 32, zeros 3 << 32, x 4 << 32, y 5 << 32, counters 6 << 32, partial sums 7 << 32.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.gpu.model.machines import Machine
from benchmarks.layers.shapes import make_layout
from mpq_kernels.format.codes import SCALE_DTYPES
from mpq_kernels.format.kinds import ZERO_KINDS
from mpq_kernels.format.layout import WeightLayout

ROOT = Path(__file__).resolve().parents[3]
SOURCES = [
    "benchmarks/gpu/model/plan.cpp",
    *(f"csrc/cuda/{name}.cpp" for name in ("work_list", "cut_work", "check", "shared_memory", "wide_map")),
]
FLAGS = ["-std=c++20", "-O1", f"-I{ROOT / 'csrc'}"]
COUNTERS = 6 << 32


class ProblemError(Exception):
    """A product that cannot be prepared."""


@dataclass(frozen=True)
class Problem:
    """y[M, N] = x[M, K] W^T. `bits`: "4", or "4|3|8" for a shape of three members (benchmarks/layers/shapes.py)."""

    shape: str
    bits: str
    tokens: int
    group_size: int = 128
    bf16: bool = False

    @property
    def layout(self) -> WeightLayout:
        """Segments of W. Raises ProblemError where widths and members differ in number."""
        layout = make_layout(self.shape, self.bits, self.group_size)
        if layout is None:
            raise ProblemError(f"{self.shape} has not as many members as {self.bits} has widths")
        return layout


@dataclass(frozen=True)
class Cut:
    """Where a block begins (csrc/cuda/params.h): row group, tile along K, the blocks that share the group."""

    group: int
    tile: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """A launch: blocks, warps of each, tokens of a block in units of 8, rows of a row group, where blocks begin, kernel
    parameters."""

    grid: tuple[int, int]
    warps: int
    token_tiles: int
    group_rows: int
    cuts: tuple[Cut, ...]
    params: bytes
    bf16: bool
    phases: int  # of wide_kernel; 0: linear_kernel
    arrange_params: bytes  # of the kernel that arranges x for wide_kernel

    @property
    def kernel(self) -> str:
        """Name as in sass_files.py."""
        bf16 = str(self.bf16).lower()
        return f"wide_kernel<{bf16}, {self.phases}>" if self.phases else f"linear_kernel<{bf16}, {self.token_tiles}>"

    @property
    def arrange_kernel(self) -> str | None:
        """The kernel that runs before it, if there is one."""
        return f"arrange_kernel<{str(self.bf16).lower()}>" if self.phases else None

    def shares_last_group(self, block: int) -> bool:
        """Whether the block begins a row group that a later one ends."""
        return self.cuts[block + 1].tile != 0

    def middle(self, groups: range) -> int | None:
        """A block in the middle of those that begin in some row groups: if there is one, one with parts of two groups,
        else one that shares its group; None where none begins there."""
        blocks = [i for i in range(self.grid[0]) if self.cuts[i].group in groups]
        one = [i for i in blocks if self.cuts[i].tile or self.shares_last_group(i)]
        two = [i for i in one if self.cuts[i].tile and self.shares_last_group(i)
               and self.cuts[i].group != self.cuts[i + 1].group]  # fmt: skip
        found = two or one or blocks
        return found[len(found) // 2] if found else None

    def representatives(self, layout: WeightLayout) -> list[int]:
        """A middle block for each combination of widths that row bands have."""
        found: dict[tuple[int, ...], range] = {}
        first = 0
        bands: dict[tuple[int, int], list[int]] = {}
        for s in layout.segments:
            bands.setdefault((s.n0, s.n1), []).append(s.bits)
        for (n0, n1), bits in bands.items():
            groups = -(-(n1 - n0) // self.group_rows)
            before = found.get(tuple(bits), range(first, first))
            if len(before) < groups:
                found[tuple(bits)] = range(first, first + groups)
            first += groups
        return [i for groups in found.values() if (i := self.middle(groups)) is not None]


@cache
def planner() -> Path:
    """plan.cpp as a program, in build/."""
    digest = hashlib.sha256()
    headers = sorted(
        path for folder in ("cuda", "include", "generated") for path in (ROOT / "csrc" / folder).glob("*.h")
    )
    for path in [*(ROOT / s for s in SOURCES), *headers]:
        digest.update(path.read_bytes())
    target = ROOT / "build" / "model" / f"plan-{digest.hexdigest()[:16]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "g++"), *FLAGS, *(str(ROOT / s) for s in SOURCES), "-o", str(beside)]
        subprocess.run(command, check=True)
        beside.rename(target)
    return target


def prepare(problem: Problem, machine: Machine) -> Plan:
    """What the host would launch. Raises ProblemError with the planner's reason."""
    layout = problem.layout
    lines = [f"{s.n0} {s.n1} {s.k0} {s.k1} {s.group_size} {s.bits} {ZERO_KINDS.index(s.zero)}" for s in layout.segments]
    words = [layout.out_features, layout.in_features, problem.tokens, machine.arch, machine.multiprocessors,
             machine.shared_bytes, SCALE_DTYPES.index("float16"), 2 if problem.bf16 else 1]  # fmt: skip
    done = subprocess.run([str(planner()), *map(str, words)], input="\n".join(lines).encode(), capture_output=True)
    if done.returncode:
        raise ProblemError(
            f"{problem.shape}, {problem.bits} bits, {problem.tokens} tokens: {done.stderr.decode().strip()}"
        )
    head, _, params = done.stdout.partition(b"\n")
    facts: dict[str, Any] = json.loads(head)
    end = len(params) - facts["arrange_bytes"]
    return Plan(
        grid=(facts["grid"][0], facts["grid"][1]), warps=facts["warps"], token_tiles=facts["token_tiles"],
        group_rows=facts["group_rows"], cuts=tuple(Cut(*c) for c in facts["cuts"]), params=params[:end],
        bf16=problem.bf16, phases=facts["phases"], arrange_params=params[end:],
    )  # fmt: skip
