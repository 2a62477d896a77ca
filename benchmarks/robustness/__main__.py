"""`python -m benchmarks.robustness [KIND ...] --seed S --cases N --jobs J -o results.json`: see docs/robustness.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.facts import facts, load_average

from .campaign import Tally, campaign
from .kinds import KINDS


def save(path: Path, data: dict[str, Any]) -> None:
    """Write the results beside their place, then there."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def run_kind(name: str, args: argparse.Namespace, data: dict[str, Any]) -> bool:
    """Go on with a kind where the results end; whether no case of it failed."""
    kind, wanted = KINDS[name], args.cases or KINDS[name].cases
    key = f"{name}, sanitized" if "LD_PRELOAD" in os.environ else name
    held = data.get(key, {})
    tally = Tally()
    if held.get("seed") == args.seed and held.get("cases", 0) <= wanted:
        about = {key: held[key] for key in ("seed", "about")}
        tally = Tally.from_dict({key: held[key] for key in tally.to_dict()})
    else:
        about = {"seed": args.seed, "about": facts(torch.device("cpu"))}
    if tally.cases >= wanted:
        return not tally.failed
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        steps = campaign(name, kind, args.seed, tally.cases, wanted - tally.cases, args.jobs, Path(folder))
        for _, more in steps:
            tally.add(more)
            data[key] = about | {"summary": kind.summary, "limits": {"seconds": kind.seconds, "bytes": kind.bytes}}
            data[key] |= tally.to_dict() | {"load_average_after": load_average()}
            if args.output is not None:
                save(args.output, data)
    outcomes = ", ".join(f"{count} {what}" for what, count in tally.outcomes.most_common())
    print(f"{key:10} {tally.cases} cases, {tally.seconds:.0f} s, slowest {tally.slowest[0]:.2f} s, ", end="")
    print(f"peak {tally.peak_bytes / 1e6:.0f} MB: {outcomes}", flush=True)
    for failure in tally.failures if tally.failed else ():
        print(f"  case {failure['case']}: {failure['what']} at {failure['place']}: {failure['text']}")
    return not tally.failed


def main() -> int:
    """1 when a case failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robustness", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}  [default: all]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="of each kind, those done before included  [default: by kind]")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("-o", "--output", type=Path, help="results, written after every chunk and gone on with")
    shm = Path("/dev/shm")
    parser.add_argument(
        "--work", type=Path, default=shm if os.access(shm, os.W_OK) else None, help="files of the cases"
    )
    args = parser.parse_args()
    unknown = [name for name in args.kinds if name not in KINDS]
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(KINDS)}")
    torch.set_num_threads(1)  # a child of a process with threads of its own could not use them
    data = json.loads(args.output.read_text()) if args.output is not None and args.output.exists() else {}
    good = [run_kind(name, args, data) for name in args.kinds or KINDS]
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
