"""Runs the cases of a kind, in forked processes that are watched, and adds up what came of them.

    case i of a kind = its function, called with random.Random("<kind> <seed> <i>")

The function returns a word for a right result, raises what the product raised, and AssertionError for a wrong result.
Good outcomes are that word and the product's own errors. Everything else is a failure, and so are: more than
`kind.seconds` of the processor, more than `kind.bytes` of memory above what the process had (malloc then fails), and a
process that ends or hangs.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import resource
import signal
import struct
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mpq_kernels.errors import MPQError

Run = Callable[[random.Random], str]
KEPT_FAILURES = 40
HANGS = 60.0  # seconds of a clock on the wall, which no case may take


@dataclass(frozen=True)
class Kind:
    """prepare: makes the function of a case, given an empty folder. cases: how many a whole campaign has.

    chunk: cases of one process. seconds, bytes: what one case may take.
    """

    summary: str
    prepare: Callable[[Path], Run]
    cases: int
    chunk: int = 2000
    seconds: float = 5.0
    bytes: int = 500 * 2**20


@dataclass
class Tally:
    """What came of some cases. peak_bytes: most memory of a process above what it began with."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    failed: int = 0
    slowest: tuple[float, int] = (0.0, -1)  # seconds of the processor, number of the case
    peak_bytes: int = 0
    seconds: float = 0.0

    def add(self, other: Tally) -> None:
        """Add what came of other cases."""
        self.cases += other.cases
        self.outcomes.update(other.outcomes)
        both = self.failures + other.failures
        self.failures = list({(each["what"], each["place"]): each for each in reversed(both)}.values())[:KEPT_FAILURES]
        self.failed += other.failed
        self.slowest = max(tuple(self.slowest), tuple(other.slowest))
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        self.seconds += other.seconds

    def fail(self, case: int, what: str, place: str = "", text: str = "") -> None:
        """Count a failure; the first of each place is kept."""
        self.outcomes[what] += 1
        self.failed += 1
        self.failures.append({"case": case, "what": what, "place": place, "text": text[-400:]})
        self.failures = list({(each["what"], each["place"]): each for each in reversed(self.failures)}.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Tally:
        """Inverse of to_dict."""
        return cls(**(data | {"outcomes": Counter(data["outcomes"]), "slowest": tuple(data["slowest"])}))


class TooSlow(BaseException):
    """No Exception, so that nothing on its way takes it for an error of the input."""


def _expired(*_: Any) -> None:
    raise TooSlow


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether an error comes of one that ran out of memory."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _place(error: BaseException) -> str:
    """File and line of the package, or of the campaign, in which an error began, and of where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/mpq_kernels/" in frame.filename or "/robustness/" in frame.filename]
    return " > ".join(f"{'/'.join(f.filename.split('/')[-3:])}:{f.lineno}" for f in (own[-1:] + frames[-1:]))


def memory(key: str) -> int:
    """Bytes of VmRSS, VmHWM or VmSize of this process."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def chance_of(name: str, seed: int, case: int) -> random.Random:
    """What decides a case."""
    return random.Random(f"{name} {seed} {case}")


def run_cases(name: str, kind: Kind, run: Run, seed: int, cases: Iterable[int], at: Callable[[int], None]) -> Tally:
    """In this process, under its limits. at: called with the number of each case before it runs."""
    tally, start, before = Tally(), time.monotonic(), memory("VmRSS")
    old = signal.signal(signal.SIGPROF, _expired)
    try:
        for case in cases:
            at(case)
            begin = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, kind.seconds)
            try:
                what = run(chance_of(name, seed, case))
                signal.setitimer(signal.ITIMER_PROF, 0)
                tally.outcomes[what] += 1
            except MPQError as error:
                signal.setitimer(signal.ITIMER_PROF, 0)
                if _out_of_memory(error):
                    tally.fail(case, "FAILURE out of memory", _place(error), str(error))
                else:
                    tally.outcomes[type(error).__name__] += 1
            except BaseException as error:  # panics of Rust libraries are no Exception
                signal.setitimer(signal.ITIMER_PROF, 0)
                tally.fail(case, f"FAILURE {type(error).__name__}", _place(error), str(error))
            tally.cases += 1
            tally.slowest = max(tally.slowest, (time.process_time() - begin, case))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
    tally.peak_bytes = max(0, memory("VmHWM") - before)
    tally.seconds = time.monotonic() - start
    return tally


@dataclass
class _Child:
    """A forked process and the cases that it was given. mark: shared memory, in which it writes where it is."""

    pid: int
    cases: list[int]
    out: Path
    mark: mmap.mmap
    seen: tuple[int, float]

    def now(self) -> int:
        return struct.unpack("q", self.mark[:8])[0]


def campaign(
    name: str, kind: Kind, seed: int, first: int, count: int, jobs: int, folder: Path
) -> Iterator[tuple[int, Tally]]:
    """Run cases first..first + count; yields (number of the next case, what came of a chunk), in order."""
    run = kind.prepare(folder)
    starts = list(range(first, first + count, kind.chunk))
    for index in range(0, len(starts), jobs):
        chunks = [range(s, min(s + kind.chunk, first + count)) for s in starts[index : index + jobs]]
        children = [_fork(name, kind, run, seed, list(chunk), folder) for chunk in chunks]
        total = Tally()
        while children:
            child = children.pop(0)
            tally, left = _wait(child)
            total.add(tally)
            children += [_fork(name, kind, run, seed, cases, folder) for cases in left if cases]
        yield chunks[-1].stop, total


def _fork(name: str, kind: Kind, run: Run, seed: int, cases: list[int], folder: Path) -> _Child:
    mark = mmap.mmap(-1, 8)
    mark[:8] = struct.pack("q", cases[0])
    descriptor, out = tempfile.mkstemp(dir=folder, suffix=".tally")
    os.close(descriptor)
    pid = os.fork()
    if pid:
        return _Child(pid, cases, Path(out), mark, (cases[0], time.monotonic()))
    code = 1
    try:
        if "LD_PRELOAD" not in os.environ:  # a sanitizer needs address space of its own
            room = memory("VmSize") + kind.bytes
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(tempfile.mkdtemp(dir=folder))

        def at(case: int) -> None:
            mark[:8] = struct.pack("q", case)

        tally = run_cases(name, kind, run, seed, cases, at)
        Path(out).write_text(json.dumps(tally.to_dict()))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _wait(child: _Child) -> tuple[Tally, list[list[int]]]:
    """(what came of the cases of a child, those that are left because it ended or was killed in one)."""
    hung = False
    while True:
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        if pid:
            break
        if child.now() != child.seen[0]:
            child.seen = (child.now(), time.monotonic())
        elif time.monotonic() - child.seen[1] > HANGS:
            hung = True
            os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.05)
    text = child.out.read_text()
    child.out.unlink()
    if status == 0 and text:
        return Tally.from_dict(json.loads(text)), []
    if status == 1 << 8:
        raise RuntimeError("a process of the campaign failed by itself; see above")
    # What is known of the cases before the one in which it ended has ended with it: they are run again.
    at = child.cases.index(child.now())
    tally = Tally(cases=1)
    what = "hung" if hung else f"ended with status {status}"
    tally.fail(child.cases[at], f"FAILURE the process {what}")
    return tally, [child.cases[:at], child.cases[at + 1 :]]
