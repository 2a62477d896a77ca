"""Writes the figures of a campaign into docs/robustness.md: `python -m benchmarks.robustness.page`."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "robustness.json"
PAGE = ROOT / "docs" / "robustness.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"


def row(name: str, data: dict[str, Any]) -> str:
    """A line of the table."""
    outcomes = sorted(data["outcomes"].items(), key=lambda item: -item[1])
    words = ", ".join(f"{what} {count:,}" for what, count in outcomes)
    slowest, peak = data["slowest"][0], data["peak_bytes"] / 1e6
    return f"| {name} | {data['cases']:,} | {words} | {data['failed']} | {slowest:.2f} | {peak:.0f} |"


def figures(results: dict[str, Any]) -> str:
    """The table, and where it comes from."""
    about = next(iter(results.values()))["about"]
    total = sum(data["cases"] for data in results.values())
    commits = sorted({data["about"]["commit"] for data in results.values()})
    seeds = sorted({data["seed"] for data in results.values()})
    packages = about["packages"]
    machine = f"{about['processor']}, {about['isa']}, one thread for each process, other programs running beside"
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages)
    lines = [
        "| kind | cases | outcomes | failures | slowest, s | peak, MB |",
        "|---|---|---|---|---|---|",
        *(row(name, data) for name, data in results.items()),
        "",
        f"* **In all:** {total:,} cases, {sum(data['failed'] for data in results.values())} failures",
        "* **Command:** `python -m benchmarks.robustness -o benchmarks/results/robustness.json`",
        *textwrap.wrap(
            f"* **Machine:** {machine}; {versions}; seeds {', '.join(map(str, seeds))}; commits {', '.join(commits)}",
            width=118,
            subsequent_indent="  ",
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Replace what stands between the two marks of the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(before + BEGIN + "\n" + figures(json.loads(RESULTS.read_text())) + "\n" + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
