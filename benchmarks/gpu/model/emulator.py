"""Runs the machine code of one block, one lane of each warp, and notes what each warp issues.

A lane stands for its warp: branches on which lanes differ go the way of lane 0, which has the most iterations of every
loop over threads. Instructions become Python functions (opcodes.py), one for each stretch of code between labels and
jumps, compiled when they are first reached. Warps take turns from barrier to barrier, so that what one writes to shared
memory before it is there for the others behind it.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.model.expressions import UnknownInstruction, pair, predicate, to_bits, to_float
from benchmarks.gpu.model.opcodes import MEMORY, OPCODES
from benchmarks.gpu.model.program import Program, operands_of

# (number of the instruction, whether its predicate held, address in global memory or 0)
Entry = tuple[int, bool, int]
EXIT = -1
MOST = 5_000_000  # stretches of code that a warp may run


def permute(x: int, selector: int, y: int) -> int:
    """PRMT."""
    data = (y << 32 | x).to_bytes(8, "little")
    out = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = data[nibble & 7]
        out |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return out


def truncate(value: float, unsigned: bool) -> int:
    """F2I.TRUNC."""
    if not math.isfinite(value):
        return 0xFFFFFFFF
    return max(0, min(int(value), 0xFFFFFFFF)) if unsigned else int(value)


def reciprocal(value: float) -> float:
    """MUFU.RCP, correctly rounded."""
    return 1.0 / value if value else math.inf


def round_up(value: int) -> int:
    """Bits of the least float32 that is not below a positive integer."""
    bits = to_bits(value)
    return bits + (to_float(bits) < value)


@dataclass(frozen=True)
class Launch:
    """One block of a launch. `params`: kernel parameters. `constants`: banks above 0. Global memory: `load`
    gives the word at an address, `atomic` adds to it and gives what it held, `store` writes it."""

    params: bytes
    params_at: int
    block: tuple[int, int] = (0, 0)
    grid: tuple[int, int] = (1, 1)
    warps: int = 1
    constants: Mapping[int, bytes] = field(default_factory=dict)
    load: Callable[[int], int] = lambda _: 0
    atomic: Callable[[int, int], int] = lambda _address, _value: 0
    store: Callable[[int, int], None] = lambda _address, _value: None

    def banks(self) -> dict[int, tuple[int, ...]]:
        """Constants as words. The first ones of bank 0: threads of a block, blocks of the grid."""
        head = struct.pack("<6I", 32 * self.warps, 1, 1, *self.grid, 1)
        first = head.ljust(self.params_at, b"\0") + self.params
        banks = {n: content + bytes(-len(content) % 4 + 256) for n, content in {0: first, **self.constants}.items()}
        return {n: struct.unpack(f"<{len(content) // 4}I", content) for n, content in banks.items()}


class Emulator:
    """Code of one kernel, compiled as far as it was reached; launches share it."""

    def __init__(self, program: Program):
        self.program = program
        self._compiled: dict[int, Any] = {}
        self._labels = set(program.labels.values())
        self._taken: list[Entry] = [(n, True, 0) for n in range(len(program.instructions))]
        self._skipped: list[Entry] = [(n, False, 0) for n in range(len(program.instructions))]

    def run(self, launch: Launch) -> list[list[Entry]]:
        """What each warp issues until its exit."""
        shared: dict[int, int] = {}
        banks = launch.banks()
        warps = [_Warp(self, launch, banks, shared, w) for w in range(launch.warps)]
        while any(not w.finished for w in warps):
            for w in warps:
                w.run_to_barrier()
        return [w.trace for w in warps]

    def stretch(self, start: int) -> Any:
        """Function of the code from an instruction to the next jump, label or barrier: returns where to go on, and
        whether a barrier was passed."""
        if start not in self._compiled:
            self._compiled[start] = self._compile(start)
        return self._compiled[start]

    def _compile(self, start: int) -> Any:
        body = []
        n = start
        while True:
            i = self.program.instructions[n]
            lines = [] if i.opcode == "NOP" else self._statements(n)
            note = f"t(({n}, True, m))" if i.opcode.split(".")[0] in MEMORY else f"t(E[{n}])"
            body += _guarded(
                i.predicate, [*lines[:-1], note, lines[-1]] if _jumps(lines) else [*lines, note], f"t(S[{n}])"
            )
            n += 1
            if i.opcode.startswith("BAR"):
                body.append(f"return {n}, True")
                break
            if _jumps(lines) and not i.predicate and not lines[-1].startswith("if"):
                break
            if n in self._labels:
                body.append(f"return {n}, False")
                break
        names = "R, U, P, V, C, M, Z, t, load, atomic, store, at"
        source = f"def stretch({names}):\n    " + "\n    ".join(body)
        scope: dict[str, Any] = {
            "E": self._taken, "S": self._skipped, "F": to_float, "B": to_bits, "permute": permute, "truncate": truncate,
            "reciprocal": reciprocal, "round_up": round_up,
        }  # fmt: skip
        exec(source, scope)
        return scope["stretch"]

    def _statements(self, n: int) -> list[str]:
        """Statements of one instruction; the last one jumps where it does."""
        i = self.program.instructions[n]
        words, a = i.opcode.split("."), operands_of(i.operands)
        match words:
            case ["EXIT", *_]:
                return [f"return {EXIT}, False"]
            case ["BRA", "DIV", *_]:  # taken where lanes have parted
                return []
            case ["BRA" | "CALL", *_]:
                name = re.search(r"`\((.*?)\)", i.operands)
                assert name
                jump = f"return {self.program.labels[name[1]]}, False"
                condition = a[0] if re.fullmatch(r"!?U?P\d", a[0]) else None
                return [f"if {predicate(condition)}: {jump}" if condition else jump]
            case ["RET", *_]:
                return [f"return at[{pair(a[0])} & 4294967295], False"]
            case _:
                if words[0] not in OPCODES:
                    raise UnknownInstruction(f"{i.opcode} {i.operands}")
                return OPCODES[words[0]](words, a)


def _jumps(lines: list[str]) -> bool:
    return bool(lines) and "return" in lines[-1]


def _guarded(condition: str, lines: list[str], otherwise: str) -> list[str]:
    """Statements under a predicate."""
    if not condition:
        return lines
    return [f"if {predicate(condition)}:", *(f"    {line}" for line in lines), "else:", f"    {otherwise}"]


class _Warp:
    def __init__(
        self, code: Emulator, launch: Launch, banks: dict[int, tuple[int, ...]], shared: dict[int, int], w: int
    ):
        self.trace: list[Entry] = []
        self.finished = False
        self._code = code
        self._next = 0
        self._state = (
            [0] * 260, [0] * 68, [False] * 8, [False] * 8, banks, shared,
            {"SR_TID.X": 32 * w, "SR_CTAID.X": launch.block[0], "SR_CTAID.Y": launch.block[1]},
            self.trace.append, launch.load, launch.atomic, launch.store, code.program.at_address,
        )  # fmt: skip

    def run_to_barrier(self) -> None:
        """Until the warp has passed a barrier, or is finished."""
        if self.finished:
            return
        for _ in range(MOST):
            self._next, stopped = self._code.stretch(self._next)(*self._state)
            if self._next == EXIT:
                self.finished = True
            if stopped or self.finished:
                return
        raise UnknownInstruction(f"a loop that does not end at instruction {self._next}")
