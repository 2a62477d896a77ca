"""The end of run_gpu.sh: summary.json, and a table short enough to be read on a screen.

python benchmarks/gpu/summary.py OUT STEPS.tsv        STEPS: lines of "name<TAB>state<TAB>seconds"
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

SHOWN_TOKENS = (1, 16, 256)
MOST_LINES = 45
CLASSES = {"M <= 16": range(1, 17), "M 17 to 63": range(17, 64), "M >= 64": range(64, 1 << 30)}


def steps_of(text: str) -> list[dict[str, Any]]:
    """The steps of a run and what came of each."""
    lines = [line.split("\t") for line in text.splitlines() if line]
    return [{"step": name, "state": state, "seconds": int(seconds)} for name, state, seconds in lines]


def read(path: Path) -> Any:
    """JSON of a file, None when there is none; a file that is no JSON gives its beginning."""
    if not path.exists():
        return None
    text = path.read_text(errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return {"unreadable": text[:300]}


def table(gemm: dict[str, Any]) -> list[str]:
    """The packed layers at a few numbers of tokens, in the order of the run; wrong or failed ones first.

    Triton's stand in `triton_ratios` where there are others to compare with.
    """
    rows = [row for row in gemm.get("results", []) if row["layer"].startswith("packed")]
    bad = [row for row in rows if row["reason"]]
    lines = [f"{r['shape']:18} {r['tokens']:4} {r['layer']:18} {r['reason']}" for r in bad[:10]]
    for row in [row for row in rows if row["backend"] != "triton"] or rows:
        if row["us_median"] is not None and row["tokens"] in SHOWN_TOKENS:
            others = [item for item in row["over"].items() if "triton" not in item[0]]
            ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in others[:5])
            lines.append(
                f"{row['shape']:18} {row['tokens']:4} {row['layer']:18} {row['us_median']:9.2f} us "
                f"{row['of_floor']:5.0%} of the floor; {ratios}"
            )
    more = len(lines) - MOST_LINES
    return lines[:MOST_LINES] + ([f"and {more} more lines in gemm.json"] if more > 0 else [])


def triton_ratios(gemm: dict[str, Any]) -> list[dict[str, Any]]:
    """The time of the CUDA library, and of gemlite, over that of the Triton kernels: least and median over cells.

    A cell is a shape and a number of tokens where both have a time; one entry for each width and class of tokens.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in gemm.get("results", []):
        if row["backend"] != "triton" or row["us_median"] is None:
            continue
        name = next(name for name, tokens in CLASSES.items() if row["tokens"] in tokens)
        for other, layer in (("cuda", f"packed {row['width']}"), ("gemlite", f"gemlite {row['width']}")):
            if layer in row["over"]:
                found.setdefault((row["width"], name, other), []).append(row["over"][layer])
    return [
        {
            "width": width,
            "tokens": name,
            "over": other,
            "least": min(r),
            "median": statistics.median(r),
            "cells": len(r),
        }
        for (width, name, other), r in sorted(found.items())
    ]


def main(out: Path, steps_file: Path) -> int:
    """Write the summary and print it; 1 when a step failed."""
    steps = steps_of(steps_file.read_text())
    gemm = read(out / "gemm.json")
    short = None
    if gemm and "results" in gemm:
        short = {key: value for key, value in gemm.items() if key not in ("results", "done", "left_out")}
        short |= {"rows": len(gemm["results"]), "layers_done": len(gemm["done"]), "layers_left": len(gemm["left_out"])}
        short["without_number"] = sum(row["us_median"] is None for row in gemm["results"])
        short["triton"] = triton_ratios(gemm)
        print("\n".join(table(gemm)))
        for r in short["triton"]:
            print(
                f"packed {r['width']:6} triton, {r['tokens']:10}: {r['median']:.2f}x {r['over']} "
                f"(least {r['least']:.2f}x of {r['cells']})"
            )
    failed = [step["step"] for step in steps if step["state"].startswith("failed")]
    files = {name: read(out / f"{name}.json") for name in ("first_contact", "probe")}
    summary = {"failed": failed, "steps": steps, **files, "gemm": short}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for step in steps:
        print(f"{step['step']:18} {step['seconds']:4} s  {step['state']}")
    print(f"failed: {', '.join(failed)}" if failed else "all passed", f"(log: {out / 'log.txt'})")
    return int(bool(failed))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} OUT STEPS.tsv")
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
