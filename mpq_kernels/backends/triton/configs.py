"""How large the parts of the work are, by architecture: a table with a source for each row, and the user's choices.

`mpq tune` measures on the device and writes the user's file; nothing is measured anywhere else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

from ...errors import FormatError

COMPUTED = "computed from bytes, registers and instructions; not measured"


@dataclass(frozen=True)
class Config:
    """One choice. A program is `num_warps` warps and as many supertiles of rows: each warp keeps its own."""

    block_m: int  # tokens of a program
    num_warps: int = 4
    num_stages: int = 4  # of the pipeline at 4 bits, where the compiler makes one; `stages` for other widths
    programs_per_unit: int = 3  # programs wanted for each multiprocessor or compute unit
    source: str = COMPUTED

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise FormatError(f"a configuration with {name}={getattr(self, name)!r}: it is one of {allowed}")


ALLOWED = {
    "block_m": (16, 32, 64),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),
    "programs_per_unit": (1, 2, 3, 4, 6, 8, 12, 16),
}

# Tokens up to which a row is meant. Sums of a program take 4 * block_m registers of each thread: 32 tokens leave room
# for words without spilling (docs/triton.md); more programs on a multiprocessor keep more bytes on their way.
TOKEN_CLASSES = (4, 16, 32, 256)

# Programs: as many as the registers of docs/triton.md let a multiprocessor hold at a time.
_FEW, _MANY = Config(16, programs_per_unit=3), Config(32, programs_per_unit=2)
TABLE: dict[str, tuple[Config, ...]] = {
    "cuda": (_FEW, _FEW, _MANY, _MANY),
    "cuda:90": (_FEW, _FEW, _MANY, _MANY),
    # Wavefronts of 64 lanes: two supertiles each would fit, but the compiler moves words between lanes all the same.
    # There the steps that are on their way wait in registers: more than one, and fewer programs find room.
    "hip": tuple(replace(row, num_stages=2) for row in (_FEW, _FEW, _MANY, _MANY)),
}

# While a step is multiplied, stages - 2 later ones are on their way to shared memory. 16 KB for each program are 32 to
# 48 KB on a multiprocessor; an H200 takes 26 KB to keep its memory busy for 800 cycles of latency.
MOST_STAGES = 6


def stages(num_stages: int, bits: int, step: int) -> int:
    """Stages for steps of so many columns, so that about as many bytes are on their way as at 4 bits and 64 columns."""
    return min(MOST_STAGES, 2 - (2 - num_stages) * 4 * 64 // (bits * step)) if num_stages > 2 else num_stages


# From this version on the compiler gives a lane of mma.sync two neighbouring columns, before it four. Seen in the SASS
# of 3.6, 3.7, 3.8 and 3.9: with the other order words are exchanged between lanes, 64 shuffles for each tile.
NATURAL_MMA_SYNC = (3, 8)

# Above so many tokens W is made dense for torch's own product. At 256 tokens and 8192 x 8192 decoding W once for each
# 32 tokens costs as much as decoding it once and a dense product: counts of instructions and bytes, not measured.
DENSE_ABOVE = 256


@dataclass(frozen=True)
class Device:
    """What choices depend on. name: as the driver gives it. arch: "cuda:90", "hip:gfx942", "interpreter"."""

    name: str
    arch: str
    units: int  # multiprocessors or compute units


def token_class(tokens: int) -> int:
    """Index of the row for so many tokens."""
    return next((i for i, most in enumerate(TOKEN_CLASSES) if tokens <= most), len(TOKEN_CLASSES) - 1)


def choose(device: Device, tokens: int, tuned: Mapping[str, tuple[Config, ...]] | None = None) -> Config:
    """The user's tuned row for this device, else the row of its architecture, else of its vendor."""
    tables = stored() if tuned is None else tuned
    rows = (
        tables.get(device.name) or TABLE.get(device.arch) or TABLE.get(device.arch.partition(":")[0]) or TABLE["cuda"]
    )
    return rows[token_class(tokens)]


def natural_columns(arch: str, version: tuple[int, ...]) -> bool:
    """Whether operand A has its columns in their natural order (unpack.py). version: of triton."""
    return arch == "cuda:90" or (arch.startswith("cuda") and version >= NATURAL_MMA_SYNC)


def widest_step(arch: str, version: tuple[int, ...], block_m: int) -> int:
    """Most columns of a step. Where x waits in registers (not natural), 64 columns of 32 tokens spill at 7 bits."""
    waits = arch.startswith("cuda") and not natural_columns(arch, version)
    return 32 if waits and block_m > 16 else 64


def cache_file() -> Path:
    """Where tuned choices are: $XDG_CACHE_HOME/mpq_kernels/triton.json, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mpq_kernels" / "triton.json"


@cache
def stored() -> dict[str, tuple[Config, ...]]:
    """Tuned choices of this user, read once; empty where there are none. Raises FormatError for a damaged file."""
    path = cache_file()
    return read(path) if path.exists() else {}


def read(path: Path) -> dict[str, tuple[Config, ...]]:
    """Device name -> a configuration for each class of tokens."""
    known = {f.name for f in fields(Config)}
    try:
        data = json.loads(path.read_text())
        table = {}
        for name, rows in data["devices"].items():
            if len(rows) != len(TOKEN_CLASSES) or any(set(row) != known for row in rows):
                raise FormatError(f"{len(TOKEN_CLASSES)} rows of {sorted(known)} are wanted for {name!r}")
            table[name] = tuple(Config(**row) for row in rows)
        return table
    except (ValueError, KeyError, TypeError, AttributeError, FormatError) as error:
        raise FormatError(
            f"{path} holds no tuned configurations ({error}): remove it, or run `mpq tune` again"
        ) from error


def write(path: Path, table: Mapping[str, tuple[Config, ...]]) -> None:
    """Replace the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"devices": {name: [asdict(row) for row in rows] for name, rows in table.items()}}, indent=1)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text + "\n")
    temporary.replace(path)
