"""Figures of the machine code of the CUDA library, as the tables of docs/kernels.md. No GPU is needed.

    python benchmarks/gpu/sass_table.py [LIBRARY]           prints the tables
    python benchmarks/gpu/sass_table.py --update [LIBRARY]  writes them between the marks in docs/kernels.md

Needs cuobjdump and nvdisasm: `pip install triton`, or a CUDA toolkit. What is counted: benchmarks/gpu/sass.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import sass, sass_files  # noqa: E402

PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- written by benchmarks/gpu/sass_table.py -->", "<!-- end -->"
# Architecture and blocks of 8 tokens of the kernels whose instructions are printed.
DETAILS = ((80, 1), (90, 1), (90, 2))


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def resource_table(kernels: Sequence[sass.Kernel]) -> Iterator[str]:
    """Registers of a thread, by kernel and architecture."""
    archs = sorted({k.arch for k in kernels})
    yield row("kernel", "threads, at most", *(f"sm_{a}" for a in archs))
    yield "|---" * (2 + len(archs)) + "|"
    table: dict[str, dict[int, sass.Kernel]] = {}
    for k in kernels:
        table.setdefault(k.name, {})[k.arch] = k
    for name, found in table.items():
        threads = max(k.max_threads for k in found.values())
        yield row(f"`{name}`", threads, *(found[a].resources["REG"] if a in found else "" for a in archs))


def cost_table(kernel: sass.Kernel) -> Iterator[str]:
    """Instructions by width."""
    costs = sass.tile_costs(kernel)
    yield row("instructions", *(f"{bits} bit{'s'[: bits > 1]}" for bits in costs))
    yield "|---" * (1 + len(costs)) + "|"

    def line(title: str, value) -> str:
        return row(title, *(value(bits, cost) for bits, cost in costs.items()))

    yield line("for each weight, no scales", lambda _, c: f"{c.per_weight():.2f}")
    for zero in ("none", "int"):
        for tiles in (1, 2):
            # Widths above 4 come one supertile at a time, and every one ends with a flush.
            yield line(
                f"groups of {64 * tiles}, zeros {zero}",
                lambda b, c, t=tiles, z=zero: f"{c.per_weight(t if b <= 4 else 1, z):.2f}",
            )
    yield line("of a supertile", lambda _, c: c.tile)
    yield line("of a flush, zeros none", lambda _, c: c.flush["none"])
    yield line("of a flush, zeros int", lambda _, c: c.flush["int"])
    yield line("of the rest of a unit, at least", lambda _, c: c.unit)


def report(library: Path) -> Iterator[str]:
    """The tables, in Markdown."""
    kernels = sass_files.read_kernels(library)
    yield "Registers of a thread; no kernel has a stack frame, spills or local memory:"
    yield ""
    yield from resource_table(kernels)
    for k in kernels:
        # bf16 differs by a few instructions outside the loops, other architectures by one or two.
        if k.stem == "linear_kernel" and "false" in k.name and (k.arch, k.token_tiles) in DETAILS:
            yield ""
            yield f"`{k.name}`, up to {8 * k.token_tiles} tokens for each block, sm_{k.arch}:"
            yield ""
            yield from cost_table(k)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path, default=ROOT / "mpq_kernels" / "_cuda.so")
    parser.add_argument("--update", action="store_true", help=f"write the tables into {PAGE.relative_to(ROOT)}")
    args = parser.parse_args()
    missing = [tool for tool in ("cuobjdump", "nvdisasm") if not sass_files.find_tool(tool)]
    if missing or not args.library.exists():
        sys.exit(
            f"{args.library} was not built" if not missing else f"no {' and no '.join(missing)}: pip install triton"
        )
    text = "\n".join(report(args.library))
    if not args.update:
        print(text)
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
