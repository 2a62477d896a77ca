"""A kernel as the model runs it: instructions with decoded control words and classes, cut into basic blocks.

Control word, bits 105 to 125 of an encoding from Volta on:

    | wait: 6 scoreboards | read: scoreboard freed when sources are read, 7: none | write: ... when the result is there,
    7: none | yield | stall: cycles until the warp's next instruction |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.sass import Graph, Instruction

# Class of an opcode's first word: (pipe, what its result waits for). machines.py has the cycles of both.
CLASSES: dict[str, tuple[str, str]] = {}
for _pipe, _latency, _words in (
    ("int", "other", "LOP3 SHF ISETP IADD3 PRMT SEL LEA VIADD VIADDMNMX IMNMX VIMNMX IABS PLOP3 P2R R2P FSETP FSEL MOV "
                     "I2FP FMNMX CS2R F2FP LOP FLO POPC BMSK"),
    ("imad", "other", "IMAD"),
    ("fma", "other", "FFMA FMUL FADD"),
    ("half", "other", "HADD2 HFMA2 HMUL2 HSET2 HSETP2"),
    ("uniform", "other", "UMOV UIADD3 USHF ULEA UIMAD ULDC USEL UISETP ULOP3 UPRMT VOTEU UP2UR UPLOP3 UFLO"),
    ("uniform", "other", "R2UR"),
    ("tensor", "other", "HMMA"),
    ("special", "special", "MUFU F2I I2F F2F FCHK"),
    ("memory", "shared", "LDS STS"),
    ("memory", "matrix", "LDSM"),
    ("memory", "l2", "LDG"),
    ("memory", "copy", "LDGSTS"),
    ("memory", "store", "STG"),
    ("memory", "atomic", "ATOMG ATOM REDG"),
    ("memory", "shuffle", "SHFL"),
    ("memory", "constant", "LDC"),
    ("memory", "identity", "S2R S2UR"),
    ("branch", "other", "BRA BSSY BSYNC EXIT CALL RET BREAK WARPSYNC"),
    ("", "fence", "MEMBAR"),
    ("", "barrier", "BAR"),
    ("", "arrive", "LDGDEPBAR"),
    ("", "wait", "DEPBAR"),
    ("", "other", "NOP YIELD ERRBAR CGAERRBAR CCTL PREEXIT ACQBULK ENDCOLLECTIVE VOTE"),
):  # fmt: skip
    CLASSES |= dict.fromkeys(_words.split(), (_pipe, _latency))

SHARED_BYTES = {"128": 16, "64": 8, "U16": 2, "U8": 1}


@dataclass(frozen=True)
class Step:
    """What the scheduler needs to know of one instruction."""

    opcode: str
    pipe: str  # "": none
    latency: str
    stall: int
    write: int  # scoreboard, 7: none
    read: int
    wait: tuple[int, ...]  # scoreboards
    bytes: int  # that one lane loads or stores
    line: int  # address
    keep: int  # groups of copies that DEPBAR leaves on their way


def operands_of(text: str) -> list[str]:
    """Operands, without `.reuse`; commas inside brackets separate nothing."""
    return [part.strip().replace(".reuse", "") for part in re.split(r",(?![^\[\](]*[\])])", text) if part.strip()]


def step_of(i: Instruction) -> Step:
    """Decodes one instruction. Raises KeyError for an opcode that CLASSES has not."""
    words = i.opcode.split(".")
    pipe, latency = CLASSES[words[0]]
    size = 16 if words[0] == "LDSM" else next((SHARED_BYTES[w] for w in words if w in SHARED_BYTES), 4)
    keep = int(operands_of(i.operands)[1], 16) if words[0] == "DEPBAR" else 0
    c = i.control
    wait = tuple(k for k in range(6) if c >> (11 + k) & 1)
    return Step(words[0], pipe, latency, max(1, c & 15), c >> 5 & 7, c >> 8 & 7, wait, size, i.address, keep)


class Program:
    """Instructions of one kernel in order, and where blocks begin."""

    def __init__(self, lines: Sequence[Instruction | str]):
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}  # -> number of the instruction that follows
        for line in lines:
            if isinstance(line, str):
                self.labels[line] = len(self.instructions)
            else:
                self.instructions.append(line)
        self.graph = Graph(list(lines))
        self.block_of = [b for b, block in enumerate(self.graph.blocks) for _ in block]
        self.at_address = {i.address: n for n, i in enumerate(self.instructions)}
        self._steps: dict[int, Step] = {}

    def step(self, n: int) -> Step:
        """Instruction n as the scheduler sees it; decoded when it is first issued."""
        if n not in self._steps:
            self._steps[n] = step_of(self.instructions[n])
        return self._steps[n]
