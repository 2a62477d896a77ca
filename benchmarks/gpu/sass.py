"""Machine code of the CUDA library, as sass_files.py reads it: resources, instructions, loops.

Loops. A kernel is cut into basic blocks and its natural loops are found through dominators. In the kernels that
multiply, run_unit (csrc/cuda/unit.cuh) has one loop for each width whose body is one supertile: 16 HMMA for each 8
tokens, and as many 16-byte loads of codes as the width has bits (512 bytes for each bit and supertile, 16 for each
lane), which tells the widths apart. The loop around it is the one over groups of scales; what lies on a path from the
end of the first to its next beginning is a flush. A lane holds 4096 / 32 = 128 weights of a supertile.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

WEIGHTS_PER_LANE = 64 * 64 // 32
MMAS_PER_TILE = 16  # m16n8k16 of 64 x 64 weights and 8 tokens


class SassError(Exception):
    """Machine code that is not what this module expects."""


@dataclass(frozen=True)
class Instruction:
    """`opcode` with its modifiers; `targets`: labels that it may go to. `control`: what the scheduler is told (bits 105
    and up of the encoding: benchmarks/gpu/model/program.py), where the text has encodings."""

    predicate: str
    opcode: str
    operands: str
    targets: tuple[str, ...] = ()
    address: int = 0
    control: int = 0


@dataclass(frozen=True)
class Loop:
    """Natural loop: numbers of its blocks, all reached through `header`."""

    header: int
    blocks: frozenset[int]


@dataclass
class Kernel:
    """One kernel of one architecture. Items of `lines` are instructions and labels (str)."""

    name: str  # as in the source: linear_kernel<false, 1>
    arch: int
    lines: list[Instruction | str]
    resources: dict[str, int]  # REG, STACK, SHARED, LOCAL
    max_threads: int

    @property
    def stem(self) -> str:
        """Name without template arguments."""
        return self.name.partition("<")[0]

    @property
    def arguments(self) -> list[str]:
        """Template arguments."""
        return self.name.partition("<")[2].rstrip(">").split(", ")

    @property
    def token_tiles(self) -> int:
        """Blocks of 8 tokens; 1 for kernels without this argument."""
        return int(self.arguments[1]) if len(self.arguments) > 1 else 1

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How often each opcode stands in the code."""
        return Counter(i.opcode for i in self.lines if isinstance(i, Instruction))

    def count(self, pattern: str) -> int:
        """Instructions whose opcode begins with a match of the expression."""
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))

    @cached_property
    def graph(self) -> Graph:
        """Control flow."""
        return Graph(self.lines)


class Graph:
    """Basic blocks, `after[b]`: the blocks that may follow block b, and loops."""

    def __init__(self, lines: list[Instruction | str]):
        self.blocks: list[list[Instruction]] = [[]]
        labels: dict[str, int] = {}
        for line in lines:
            if isinstance(line, str):
                if self.blocks[-1]:
                    self.blocks.append([])
                labels[line] = len(self.blocks) - 1
            else:
                self.blocks[-1].append(line)
                if line.targets or re.match(r"EXIT|RET|BSYNC|KILL|BRK", line.opcode):
                    self.blocks.append([])
        if not self.blocks[-1]:
            self.blocks.pop()
        self.after = self._edges(labels)

    def _edges(self, labels: dict[str, int]) -> list[list[int]]:
        edges: list[list[int]] = []
        meetings: dict[str, int] = {}  # barrier -> the block that the last BSSY before names
        for i, block in enumerate(self.blocks):
            nexts = {i + 1} if i + 1 < len(self.blocks) else set()
            for line in block:
                if line.opcode.startswith("BSSY"):
                    meetings[line.operands.split(",")[0].strip()] = labels[line.targets[0]]
            last = block[-1] if block else None
            if last and last.opcode.startswith("BSYNC"):
                meeting = meetings.get(last.operands.strip())
                if meeting is not None and meeting != i + 1:
                    nexts = {meeting}
            elif last and re.match(r"EXIT|RET|KILL", last.opcode):
                nexts = nexts if last.predicate else set()
            elif last and last.targets and not last.opcode.startswith("BSSY"):
                # "BRA `(L)" alone always jumps; with a predicate, or "BRA.U !UP0, `(L)", it may fall through. A CALL of
                # a label of the kernel is a jump; one of a function comes back and has no target here.
                always = not last.predicate and (last.opcode == "BRX" or last.operands.startswith("`("))
                nexts = (set() if always else nexts) | {labels[t] for t in last.targets}
            edges.append(sorted(n for n in nexts if n < len(self.blocks)))
        return edges

    @cached_property
    def before(self) -> list[list[int]]:
        """The blocks that may come before each block."""
        before: list[list[int]] = [[] for _ in self.blocks]
        for b, nexts in enumerate(self.after):
            for n in nexts:
                before[n].append(b)
        return before

    @cached_property
    def order(self) -> list[int]:
        """Reachable blocks, each before those that it leads to but for loops."""
        seen, order, stack = {0}, [], [(0, iter(self.after[0]))]
        while stack:
            block, rest = stack[-1]
            following = next((n for n in rest if n not in seen), None)
            if following is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.after[following])))
        return order[::-1]

    @cached_property
    def dominator(self) -> dict[int, int]:
        """The nearest block that every way from the beginning passes. After Cooper, Harvey, Kennedy (2001)."""
        place = {b: i for i, b in enumerate(self.order)}
        found = {0: 0}

        def meet(a: int, b: int) -> int:
            while a != b:
                while place[a] > place[b]:
                    a = found[a]
                while place[b] > place[a]:
                    b = found[b]
            return a

        changed = True
        while changed:
            changed = False
            for b in self.order[1:]:
                nearest: int | None = None
                for p in self.before[b]:
                    if p in found:
                        nearest = p if nearest is None else meet(p, nearest)
                assert nearest is not None
                if found.get(b) != nearest:
                    found[b] = nearest
                    changed = True
        return found

    def dominates(self, a: int, b: int) -> bool:
        """Whether every way to b passes a."""
        while b not in (a, 0):
            b = self.dominator[b]
        return a == b

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops, small ones first; back edges to one header make one loop."""
        bodies: dict[int, set[int]] = {}
        for b in self.order:
            for header in self.after[b]:
                if not self.dominates(header, b):
                    continue
                body = bodies.setdefault(header, {header})
                stack = [b]
                while stack:
                    block = stack.pop()
                    if block not in body:
                        body.add(block)
                        stack += self.before[block]
        return sorted((Loop(h, frozenset(b)) for h, b in bodies.items()), key=lambda loop: len(loop.blocks))

    def count(self, blocks: frozenset[int] | tuple[int, ...], pattern: str = "") -> int:
        """Instructions of these blocks whose opcode begins with a match of the expression."""
        return sum(bool(re.match(pattern, i.opcode)) for b in blocks for i in self.blocks[b])

    def parent(self, loop: Loop) -> Loop:
        """The next loop around this one."""
        return next(o for o in self.loops if loop.blocks < o.blocks and o.header != loop.header)

    def paths(self, inner: Loop, outer: Loop) -> Iterator[tuple[int, ...]]:
        """Ways inside `outer`, without a circle, from the end of `inner` to its beginning."""
        inside = outer.blocks - inner.blocks
        stack: list[tuple[int, ...]] = [(n,) for b in inner.blocks for n in self.after[b] if n in inside]
        while stack:
            path = stack.pop()
            for n in self.after[path[-1]]:
                if n == inner.header:
                    yield path
                elif n in inside and n not in path:
                    stack.append((*path, n))

    def shortest(self, inner: Loop, outer: Loop, by_way_of: str) -> int:
        """Instructions of the cheapest way inside `outer` from the end of `inner` to its beginning through a block that
        has an instruction of this kind."""
        inside = outer.blocks - inner.blocks
        queue = [(0, n, False) for b in inner.blocks for n in self.after[b] if n in inside]
        done = set()
        while queue:
            cost, block, passed = heapq.heappop(queue)
            if (block, passed) in done:
                continue
            done.add((block, passed))
            cost += len(self.blocks[block])
            passed = passed or self.count((block,), by_way_of) > 0
            for n in self.after[block]:
                if n == inner.header and passed:
                    return cost
                if n in inside:
                    heapq.heappush(queue, (cost, n, passed))
        raise SassError(f"no way around the loop at block {inner.header} through {by_way_of}")


@dataclass(frozen=True)
class TileCost:
    """Instructions that one lane issues for a supertile, for a flush of fp16 scales by kind of zeros, and for the rest
    of a unit: bookkeeping of the ring and of the panel, at the least (scales of one group are copied on that way, codes
    are not)."""

    tile: int
    flush: dict[str, int]  # "none", "int"
    unit: int

    def per_weight(self, tiles: int = 1, zero: str | None = None) -> float:
        """For each weight, with a flush after every `tiles` supertiles where a kind of zeros is named."""
        return (self.tile + (self.flush[zero] / tiles if zero else 0)) / WEIGHTS_PER_LANE


def _flush_paths(graph: Graph, inner: Loop) -> dict[str, tuple[int, ...]]:
    """Kind of zeros -> cheapest way from a tile to the next one through a flush with fp16 scales.

    These are converted by 8 HADD2; zeros are 8 bytes ("int") or a constant ("none"), and take no 16-byte load.
    """
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    for path in graph.paths(inner, graph.parent(inner)):
        if graph.count(path, r"HADD2\.F32") == 8:
            key = graph.count(path, r"LDS\.128"), graph.count(path, r"LDS\.64")
            if key not in found or graph.count(path) < graph.count(found[key]):
                found[key] = path
    loads = min((key[0] for key in found), default=0)
    if not {(loads, 0), (loads, 1)} <= set(found):
        raise SassError(f"flush after the loop at block {inner.header}: no path without zeros and with integer zeros")
    return {"none": found[loads, 0], "int": found[loads, 1]}


def tile_costs(kernel: Kernel) -> dict[int, TileCost]:
    """Width -> cost of a whole supertile in the main loop of run_unit. Raises SassError unless there is one for each.

    Loads of codes that do not depend on the tile (widths above 4 come one tile at a time) may stand in the block before
    the loop, with the unpacking of what they load; that block is then counted as part of the tile.
    """
    graph = kernel.graph
    found: dict[int, TileCost] = {}
    for loop in graph.loops:
        if graph.count(loop.blocks, "HMMA") != MMAS_PER_TILE * kernel.token_tiles:
            continue
        if any(o.blocks < loop.blocks and graph.count(o.blocks, "HMMA") for o in graph.loops):
            continue
        paths = _flush_paths(graph, loop)
        moved = graph.count(paths["none"], r"LDS\.128") - 1  # one is of scales
        ahead = paths["none"][-1:] if moved else ()
        bits = graph.count(loop.blocks, r"LDS\.128") + graph.count(ahead, r"LDS\.128")
        if graph.count(loop.blocks, "LDSM") != 2 * kernel.token_tiles or bits in found or not 1 <= bits <= 8:
            raise SassError(f"{kernel.name}: a second or strange loop with {bits} loads of codes")
        before = graph.count(ahead)
        flush = {kind: graph.count(path) - before for kind, path in paths.items()}
        groups = graph.parent(loop)
        cheapest = min(graph.count(path) for path in graph.paths(loop, groups))
        unit = graph.shortest(loop, graph.parent(groups), r"LDGSTS\.E\.BYPASS") - cheapest
        found[bits] = TileCost(graph.count(loop.blocks) + before, flush, unit)
    if sorted(found) != list(range(1, 9)):
        raise SassError(f"{kernel.name} for sm_{kernel.arch}: main loops of the widths {sorted(found)} only")
    return dict(sorted(found.items()))
