"""Which part of the work an instruction belongs to.

csrc/cuda/linear.cuh, from its nest of loops:

prologue                                    first copies, waiting for the kernel ahead
for item:                       reduction   warps added, partial sums written, added by the last block
    for panel:                  panel       x to shared memory
        for unit:               copies      the next unit is copied, the ring turned
            for group:          flush       scales and zeros
                for tile:       product     codes unpacked and multiplied

csrc/cuda/decode.cuh has a loop of units alone. What is before it is its prologue, x included; in it, blocks of code
with products are `product`, copies of the next unit among them, and the others `flush`; behind it is its reduction.
"""

from __future__ import annotations

from benchmarks.gpu.model.program import Program
from benchmarks.gpu.sass import Graph, Loop

ONE_LOOP = ("prologue", "product", "flush", "reduction")  # of decode_kernel
OTHER = ("before products", "products", "products", "after products")  # of a kernel that is built otherwise


def products(graph: Graph) -> list[Loop]:
    """Loops with matrix products, small ones first."""
    return [loop for loop in graph.loops if graph.count(loop.blocks, "HMMA")]


def nest(graph: Graph) -> tuple[Loop, Loop, Loop] | None:
    """Loops over units, panels and items: the three smallest that hold every matrix product that is in a loop."""
    loops = products(graph)
    most = max((graph.count(loop.blocks, "HMMA") for loop in loops), default=0)
    outer = [loop for loop in loops if graph.count(loop.blocks, "HMMA") == most]
    inner = [loop for loop in loops if graph.count(loop.blocks, "HMMA") < most]
    return (outer[0], outer[1], outer[2]) if len(outer) == 3 and inner else None


def phases_of(program: Program, decode: bool = False) -> list[str]:
    """Phase of each instruction. decode: of decode_kernel."""
    graph = program.graph
    found = None if decode else nest(graph)
    by_block = _by_loops(graph, *found) if found else _around_products(graph, ONE_LOOP if decode else OTHER)
    return [by_block[b] for b in program.block_of]


def _by_loops(graph: Graph, unit: Loop, panel: Loop, item: Loop) -> list[str]:
    phases = ["prologue"] * len(graph.blocks)
    rows = [(item, "reduction"), (panel, "panel"), (unit, "copies")]
    inside = [loop for loop in products(graph) if loop.blocks < unit.blocks]
    rows += [(loop, "flush") for loop in inside]
    rows += [(loop, "product") for loop in inside if not any(other.blocks < loop.blocks for other in inside)]
    for loop, phase in rows:
        for b in loop.blocks:
            phases[b] = phase
    return phases


def _around_products(graph: Graph, names: tuple[str, str, str, str]) -> list[str]:
    before, product, between, after = names
    inside = {b for loop in products(graph) for b in loop.blocks}
    first, last = min(inside, default=len(graph.blocks)), max(inside, default=-1)

    def phase(b: int) -> str:
        if b < first or b > last:
            return before if b < first else after
        return product if graph.count((b,), "HMMA") else between

    return [phase(b) for b in range(len(graph.blocks))]
