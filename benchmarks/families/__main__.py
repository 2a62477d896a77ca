"""Sweep the families of transformers with tiny random models.

python -m benchmarks.families                                       # all of them: a line each
python -m benchmarks.families --only gpt_neox,granitemoe --again    # some of them, run anew
python -m benchmarks.families --json benchmarks/results/families.json --write-docs docs/models.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.facts import facts
from benchmarks.families import causal, encoders, multimodal
from benchmarks.families.cases import Kind
from benchmarks.families.pages import page
from benchmarks.families.sweep import sweep, warm_up

KINDS: dict[str, Kind] = {"causal": causal.KIND} | multimodal.KINDS | encoders.KINDS


def kept_rows(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """These rows, and those of a file for cases that are not among them, in the order of KINDS and of names."""
    held = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    found = {(row["kind"], row["model_type"]): row for row in [*held, *rows]}
    kinds = list(KINDS)
    return sorted(found.values(), key=lambda row: (kinds.index(row["kind"]), row["model_type"]))


def main() -> int:
    """Exit code 1 where a case is wrong, crashed or was refused late."""
    parser = argparse.ArgumentParser(description="Sweep the families of transformers with tiny random models.")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only families of this kind")
    parser.add_argument("--only", default="", help="model types, with commas between them")
    parser.add_argument("--lines", type=Path, default=Path("families.jsonl"), help="rows as they come; gone on with")
    parser.add_argument("--again", action="store_true", help="also run cases whose rows are there")
    parser.add_argument("--gptq", action="store_true", help="also pack with gptq")
    parser.add_argument("--json", type=Path, help="write rows here; it keeps rows of others")
    parser.add_argument("--write-docs", type=Path, metavar="FILE", help="write the page of models here")
    words = parser.parse_args()
    cases = [case for name in words.kind or KINDS for case in KINDS[name].cases()]
    if words.only:
        wanted = set(words.only.split(","))
        unknown = wanted - {case.model_type for case in cases}
        if unknown:
            parser.error(f"unknown model types: {', '.join(sorted(unknown))}")
        cases = [case for case in cases if case.model_type in wanted]
    warm_up()
    rows = []
    for row in sweep(cases, words.lines, words.gptq, words.again):
        rows.append(row)
        told = f"{row['packed']}/{row['linears']} {row['difference']:.0e}" if row["state"] == "right" else row["why"]
        print(f"{row['kind']:10} {row['model_type']:28} {row['state']:12} {row['stage']:13} {told}", flush=True)
    print(", ".join(f"{state}: {count}" for state, count in Counter(row["state"] for row in rows).most_common()))
    if words.json:
        rows = kept_rows(words.json, rows)
        words.json.write_text(json.dumps({"facts": facts(torch.device("cpu")), "rows": rows}, indent=1) + "\n")
    if words.write_docs:
        words.write_docs.write_text(page({name: kind.title for name, kind in KINDS.items()}, rows), encoding="utf-8")
    return int(any(row["state"] not in ("right", "refused", "not judged") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
