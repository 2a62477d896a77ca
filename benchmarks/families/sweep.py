"""All cases, each in a forked process of its own: one that crashes or hangs ends with a row like every other.

Rows are appended to a file of JSON lines as they come, so that a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .cases import Case
from .check import CRASHED, Row, check

SECONDS = 120.0  # of one case


def run(case: Case, gptq: bool, seconds: float = SECONDS) -> dict[str, Any]:
    """The row of a case, made in a process of its own."""
    context = multiprocessing.get_context("fork")  # the child has everything imported
    with tempfile.TemporaryDirectory() as folder:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(case, Path(folder), gptq, there))
        process.start()
        there.close()
        row = Row(case.kind, case.model_type, state=CRASHED, why=f"no result within {seconds:g} s").to_dict()
        if here.poll(seconds):
            try:
                row = here.recv()
            except EOFError:
                process.join()
                row["why"] = f"the process ended with exit code {process.exitcode}"
        process.kill()
        process.join()
    return row


def _child(case: Case, folder: Path, gptq: bool, pipe: Connection) -> None:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        row = check(case, folder, gptq)
    pipe.send(row.to_dict())
    pipe.close()


def sweep(cases: Iterable[Case], lines: Path, gptq: bool, again: bool) -> Iterator[dict[str, Any]]:
    """Rows of all cases, in their order. lines: where they are kept; again: also run those that are there."""
    known = {} if again else {f"{row['kind']}/{row['model_type']}": row for row in read_lines(lines)}
    for case in cases:
        row = known.get(case.name)
        if row is None:
            row = run(case, gptq)
            with open(lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        yield row


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows that were kept; of a case that was run more than once, the last."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return list({(row["kind"], row["model_type"]): row for row in rows}.values())


def warm_up() -> None:
    """Import what every child needs, once. One thread: a forked child has no others."""
    import torch
    import transformers.modeling_utils  # noqa: F401
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.stdout.flush()
