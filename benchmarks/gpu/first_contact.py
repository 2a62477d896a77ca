"""The first minutes on a device: is it what the kernels count on, and what should the machine model's constants be?

    python benchmarks/gpu/first_contact.py --json OUT/first_contact.json         at most two minutes
    python benchmarks/gpu/first_contact.py --dry-run                             what it would do; it compiles only

    first_contact.cu --(lines of JSON)--> parsed --> constants: a value beside each one of model/machines.py
    torch.ops.mpq.linear --> one-hot tokens through every width; 4 and 2 bits at M = 1, 8, 16 from cold memory

Everything is written as it comes: what fails or finds no time leaves the rest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.model.machines import GRAPH_NODE_US, MACHINES, Machine

SOURCE = Path(__file__).with_name("first_contact.cu")
ARCHES = ("80", "90a")  # what a dry run compiles for
BUDGETS = {"compile": 45, "device": 60, "one-hot": 15, "products": 25}  # s, each at most
BUDGET_S = 110
SHAPE, WIDTHS, TOKENS, COLD_MB = "8192x8192", ("4", "2"), (1, 8, 16), 500
Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Constant:
    """One constant of the machine model, named as there. present: None where no machine of the model fits."""

    name: str
    measured: float
    present: float | None
    how: str

    @property
    def ratio(self) -> float | None:
        """Measured over present."""
        return self.measured / self.present if self.present else None


def parsed(text: str) -> dict[str, Any]:
    """The parts that the program printed, one JSON object on each line; a line that was cut off is left out."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        try:
            part = json.loads(line)
        except ValueError:
            continue
        if isinstance(part, dict):
            found |= part
    return found


def machine_of(raw: Raw) -> str | None:
    """The machine of the model that a device is: by its name."""
    name = str(raw.get("device", "")).lower().replace(" ", "")
    return next((key for key in MACHINES if key in name), None)


def node_us(raw: Raw, overlap: bool) -> float | None:
    """From the end of one kernel of a graph to the beginning of the next: with the most shared memory, the longest."""
    rows = [row for row in raw.get("chain", []) if row["overlap"] == overlap]
    if not rows or "clock_hz" not in raw:
        return None
    row = max(rows, key=lambda row: (row["shared_bytes"], row["spin_cycles"]))
    return float(row["us"] - 1e6 * row["spin_cycles"] / raw["clock_hz"])


def copies_fit(raw: Raw) -> tuple[float, float] | None:
    """(bytes/s, cycles) of the memory: how fast copies come at most, and how long one is on its way under load.

    With n bytes on their way in each of m multiprocessors, a rate of min(bandwidth, m n / latency): the latency is of
    the fullest ring below 0.8 of the most.
    """
    rates = [
        (1024 * row["kb"], 1e9 * max(row["lanes_gbps"], row["bulk_gbps"])) for row in raw.get("copies", [])
    ]  # fmt: skip
    rates = [(n, rate) for n, rate in rates if rate > 0]
    if not rates or not {"multiprocessors", "clock_hz"} <= set(raw):
        return None
    most = max(rate for _, rate in rates)
    below = [(n, rate) for n, rate in rates if rate < 0.8 * most] or rates[:1]
    n, rate = max(below)
    return most, raw["multiprocessors"] * n / rate * raw["clock_hz"]


def tensor_cycles(raw: Raw) -> float | None:
    """Cycles of a scheduler for a product of normal operands, with the most warps."""
    rows = [row for row in raw.get("hmma", []) if not row["subnormal"]]
    return max(rows, key=lambda row: row["warps"])["cycles"] if rows else None


def constants(raw: Raw, machine: Machine | None) -> list[Constant]:
    """What the model's constants should be, those that the device was asked for."""
    found: list[Constant] = []

    def add(name: str, measured: float | None, present: Callable[[Machine], float], how: str) -> None:
        if measured is not None and measured > 0:
            found.append(Constant(name, measured, None if machine is None else present(machine), how))

    cycles, pipes = raw.get("cycles", {}), dict(raw.get("pipes", {}))
    fit = copies_fit(raw)
    pipes["tensor"] = tensor_cycles(raw)
    add("GRAPH_NODE_US", node_us(raw, overlap=False), lambda m: GRAPH_NODE_US, "a chain of kernels, less their cycles")
    add("multiprocessors", raw.get("multiprocessors"), lambda m: m.multiprocessors, "the driver")
    add("clock", raw.get("clock_hz"), lambda m: m.clock, "cycles in a time by the device's timer, one thread")
    add("shared_bytes", raw.get("shared_bytes"), lambda m: m.shared_bytes, "the driver")
    add("bandwidth", fit and fit[0], lambda m: m.bandwidth, "the fastest copies into shared memory")
    add("l2_bandwidth", 1e9 * raw.get("l2_gbps", 0), lambda m: m.l2_bandwidth, "copies of a part of L2")
    add("shared_rate", raw.get("shared_rate"), lambda m: m.shared_rate, "loads of 16 bytes")
    for name, value in pipes.items():
        add(f"pipes.{name}", value, lambda m, name=name: m.pipes[name], "independent instructions of four warps")
    for name in ("shared", "matrix", "constant", "special", "shuffle", "l2", "dram", "atomic", "fence"):
        key = "store_and_fence" if name == "fence" else name
        add(f"latency.{name}", cycles.get(key), lambda m, name=name: m.latency[name], "a chain of one thread or warp")
    barrier = cycles.get("barrier_of_8_warps")
    add("latency.barrier", barrier, lambda m: m.latency["barrier"], "8 warps that do nothing else")
    return found


def doubts(raw: Raw) -> list[str]:
    """What the kernels or the model count on and this device does not do."""
    found = []
    for row in raw.get("hmma", []):
        if not row["exact"]:
            found.append(f"products of {'subnormal' if row['subnormal'] else 'normal'} operands are not exact")
    normal, other = (
        [row["cycles"] for row in raw.get("hmma", []) if row["subnormal"] == subnormal] for subnormal in (False, True)
    )
    if normal and other and max(other) > 1.05 * max(normal):
        found.append(f"products of subnormal operands take {max(other) / max(normal):.2f} times as long")
    plain, overlapped = node_us(raw, overlap=False), node_us(raw, overlap=True)
    if plain is not None and overlapped is not None and overlapped >= plain:
        found.append("programmatic overlap makes the step between kernels no shorter")
    return list(dict.fromkeys(found))


def report(raw: Raw, products: list[dict[str, Any]], notes: Mapping[str, str]) -> dict[str, Any]:
    """What is written. notes: reasons of what was left out."""
    name = machine_of(raw)
    fit, plain = copies_fit(raw), node_us(raw, overlap=True)
    rows = constants(raw, MACHINES[name] if name else None)
    return {
        "device": raw.get("device"), "machine": name, "complete": bool(raw.get("complete")), "left_out": dict(notes),
        "doubts": doubts(raw),
        "constants": {
            c.name: {"measured": c.measured, "present": c.present, "ratio": c.ratio, "how": c.how} for c in rows
        },
        "loaded_latency_cycles": fit and fit[1], "node_us_with_overlap": plain, "products": products, "raw": dict(raw),
    }  # fmt: skip


def lines(made: Mapping[str, Any]) -> list[str]:
    """The report, short."""
    out = [
        f"{made['device']}, {made['machine'] or 'no machine of the model'}",
        f"{'constant':18}{'measured':>14}{'present':>14}",
    ]
    for name, c in made["constants"].items():
        present = "" if c["present"] is None else f"{c['present']:14.5g}{c['ratio']:8.2f}"
        out.append(f"{name:18}{c['measured']:14.5g}{present}")
    for row in made["products"]:
        out.append(f"{row['bits']} bits, M={row['tokens']}: {row['reason'] or '{:.2f} us'.format(row['us'])}")
    return out + [f"DOUBT: {text}" for text in made["doubts"]] + [f"{k}: {v}" for k, v in made["left_out"].items()]


def compiled(arch: str, to: Path) -> str | None:
    """None, or why there is no program for an architecture at `to`."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "no nvcc on the PATH"
    code = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-Wno-deprecated-gpu-targets"]
    command = [nvcc, "-O3", "-std=c++17", *code, str(SOURCE), "-o", str(to)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUDGETS["compile"], check=False)
    except subprocess.TimeoutExpired:
        return f"nvcc took more than {BUDGETS['compile']} s"
    return None if done.returncode == 0 else f"nvcc: {done.stderr.strip()[:500]}"


def device_lines(program: Path, seconds: float) -> tuple[str, str | None]:
    """(what the program printed, why that is not all)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        try:
            status = subprocess.run([program], stdout=out, stderr=errors, timeout=seconds, check=False).returncode
            reason = f"ended with {status}" if status else None
        except subprocess.TimeoutExpired:
            reason = f"stopped after {seconds:.0f} s"
        out.seek(0)
        errors.seek(0)
        said = errors.read().strip()[:300]
        return out.read(), f"{reason}: {said}" if reason and said else reason


def wrong_widths(device: str) -> list[str]:
    """Widths and dtypes for which one-hot tokens do not give the weight bit for bit, through torch.ops.mpq.linear."""
    import torch

    from mpq_kernels.backends import ops  # noqa: F401  (defines the operators)
    from mpq_kernels.format import reference
    from mpq_kernels.format.layout import WeightLayout
    from mpq_kernels.format.random import random_weight

    wrong = []
    for bits in range(1, 9):
        layout = WeightLayout.uniform(200, 256, bits, 64, "int")
        packed = random_weight(layout, "cpu", torch.Generator().manual_seed(bits))
        moved, wanted = packed.to(device), reference.dequantize(packed).T
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.eye(256, dtype=dtype, device=device)
            for m in (1, 8, 16, 64):
                y = torch.ops.mpq.linear(
                    x[:m], moved.qweight, moved.scales, moved.zeros, None, None, layout.segment_ints(), 200, 256
                )
                if not torch.equal(y.cpu(), wanted[:m].to(dtype)):
                    wrong.append(f"{bits} bits, M={m}, {dtype}")
    return wrong


def timed_products(bandwidth: float) -> list[dict[str, Any]]:
    """us of packed products in a graph over cold weights, checked before: the units of gemm.py."""
    import torch

    from benchmarks.gpu.budget import Unit
    from benchmarks.gpu.measure import Bench
    from benchmarks.layers.shapes import add_shape
    from benchmarks.layers.timing import GraphRun

    add_shape(SHAPE)
    bench = Bench(torch.device("cuda"), 128, COLD_MB, 0.2, {}, {}, GraphRun, bandwidth)
    units = [Unit(SHAPE, "packed", f"packed {w}", w, torch.float16, TOKENS, backend="cuda") for w in WIDTHS]
    rows = [(unit.width, row) for unit in units for row in bench.rows(unit)]
    return [
        {"bits": bits, "tokens": row.tokens, "us": row.us_median, "of_floor": row.of_floor, "reason": row.reason}
        for bits, row in rows
    ]


def on_operators(raw: Raw, left: Callable[[], float], notes: dict[str, str]) -> list[dict[str, Any]]:
    """Checks and times the project's own operators; what cannot be goes to the notes."""
    from mpq_kernels.backends import cuda

    reason = cuda.why_unavailable()
    if reason:
        notes |= {"one-hot": reason, "products": reason}
        return []
    try:
        wrong = wrong_widths("cuda")
        if wrong:
            notes["one-hot"] = f"WRONG: {', '.join(wrong)}"
        if left() < BUDGETS["products"]:
            notes["products"] = "no time left"
            return []
        fit = copies_fit(raw)
        return timed_products(fit[0] / 1e9 if fit else 1.0)
    except RuntimeError as error:  # of a kernel, or of a lost context: said, and the rest is written
        notes["products"] = str(error).splitlines()[0]
        return []


def dry_run() -> int:
    """Say what would be done, and compile; 1 where it does not."""
    for name, seconds in BUDGETS.items():
        print(f"{name}: at most {seconds} s")
    print(f"all: at most {BUDGET_S} s; {SHAPE}, {'/'.join(WIDTHS)} bits, M = {', '.join(map(str, TOKENS))}")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for arch in ARCHES:
            reason = compiled(arch, Path(folder) / arch)
            failed |= reason is not None and shutil.which("nvcc") is not None
            print(f"sm_{arch}: {reason or 'compiles'}")
    return int(failed)


def main() -> int:
    """1 where the device does not do what the kernels count on, or nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--program", type=Path, help="first_contact.cu, compiled; made here without it")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        return dry_run()
    begin, notes = time.monotonic(), {}

    def left() -> float:
        return args.budget_s - (time.monotonic() - begin)

    import torch

    if not torch.cuda.is_available():
        print("first_contact.py: no CUDA device; --dry-run does what needs none", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = args.program or Path(folder) / "first_contact"
        reason = None if args.program else compiled(f"{major}{minor}" + ("a" if major == 9 else ""), program)
        text = ""
        if reason is None:
            text, reason = device_lines(program, min(BUDGETS["device"], left()))
    raw = parsed(text)
    if reason:
        notes["device"] = reason
    made = report(raw, [], notes)
    write(args.json, made)  # before anything of the project's runs
    made = report(raw, on_operators(raw, left, notes), notes)
    write(args.json, made)
    print("\n".join(lines(made)))
    wrong = notes.get("one-hot", "").startswith("WRONG") or any(row["reason"] for row in made["products"])
    return int(wrong or bool(made["doubts"]) or not made["constants"])


def write(path: Path | None, made: Mapping[str, Any]) -> None:
    """Replace the file."""
    if path:
        path.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
