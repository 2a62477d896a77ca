"""`gemm.py --device cuda`: the order of a run, its time, its files, and what a dry run does instead."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.facts import facts
from benchmarks.gpu.budget import PACKED_BACKENDS, Unit, plan, without_absent
from benchmarks.gpu.measure import LEAST_COPIES, Bench, Broken
from benchmarks.layers.plot import plot
from benchmarks.layers.rows import DENSE, GPU_HEADS, GpuRow, gpu_line, read_json, set_ratios, write_json
from benchmarks.layers.shapes import SHAPES, TOKENS, make_layout, parts_of
from benchmarks.layers.timing import EagerRun, GraphRun, copies_for, cuda_ceilings
from benchmarks.peers.installed import all_peers, look_into_site
from benchmarks.peers.torch import NO_DEVICE, Peer
from mpq_kernels.backends import BACKENDS

SMALL_ROWS, SMALL_COLS, SMALL_TOKENS = 192, 512, (1, 3)  # of a dry run's weights
DRY_WIDTHS = ("1", "2", "3", "4", "5", "6", "7", "8", "4|3|8")
RESUMED = 25  # processes that one run may use


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What only a GPU's run takes."""
    group = parser.add_argument_group("on CUDA")
    group.add_argument("--peers", help="names, separated by commas; all without it")
    group.add_argument("--budget-s", type=float, default=1e9, help="stop cleanly after so many seconds, start included")
    group.add_argument("--unit-s", type=float, default=60, help="seconds that one layer of one shape may take")
    group.add_argument("--plot", type=Path, help="picture to write at the end")
    group.add_argument(
        "--dry-run", action="store_true", help="list what would be measured, try small weights on the CPU"
    )
    group.add_argument("--warm", action="store_true", help="only compile what peers compile at their first call")
    group.add_argument("--resume", action="store_true", help="leave out what --json holds already")


def main(args: argparse.Namespace, words: list[str], started: float) -> int:
    """Measure within the budget. 1 when a packed layer was wrong or failed, or nothing was measured."""
    look_into_site()
    peers = all_peers(args.group)
    chosen = list(peers) if args.peers is None else args.peers.split(",")
    unknown = [name for name in chosen if name not in peers]
    if unknown:
        print(f"gemm.py: no peer {', '.join(unknown)}; there are {', '.join(peers)}", file=sys.stderr)
        return 2
    peers = {name: peers[name] for name in chosen}
    wanted = PACKED_BACKENDS if args.backend is None else tuple(args.backend.split(","))
    unknown = [name for name in wanted if name not in BACKENDS]
    if unknown:
        print(f"gemm.py: no backend {', '.join(unknown)}; there are {', '.join(BACKENDS)}", file=sys.stderr)
        return 2
    if args.dry_run:
        return dry_run(plan(args.shapes, args.widths, args.tokens, peers, args.dtype, wanted), peers, args)
    if not torch.cuda.is_available():
        print("gemm.py: no CUDA device; --dry-run does what needs none", file=sys.stderr)
        return 2
    backends = {name: BACKENDS[name].why_unavailable() for name in wanted}
    reasons = {name: peer.why_unavailable() for name, peer in peers.items()}
    units = plan(args.shapes, args.widths, args.tokens, peers, args.dtype, working(backends))
    units = without_absent(units, reasons)
    bench = Bench(
        args.device, args.group, args.total_mb, args.seconds, peers, reasons, GraphRun, 1.0, backends=backends,
        deadline=started + args.budget_s,
    )  # fmt: skip
    if args.warm:
        bench.total_mb, bench.least_copies = 0, 1
        for unit, result in bench.warm(units):
            print(f"{unit.key}: {result}", flush=True)
        return 0
    return Session(args, words, started, bench, units).run()


def working(reasons: Mapping[str, str | None]) -> tuple[str, ...]:
    """Backends that work; all where none does, so that rows say why."""
    return tuple(name for name, reason in reasons.items() if reason is None) or tuple(reasons)


class Session:
    """One run: facts, rows so far, the files. Several processes make one run when a CUDA context is lost."""

    def __init__(
        self, args: argparse.Namespace, words: list[str], started: float, bench: Bench, units: list[Unit]
    ) -> None:
        self.args, self.words, self.started, self.bench = args, words, started, bench
        self.rows: list[GpuRow] = []
        if args.resume and args.json and args.json.exists():
            self.about, self.rows = read_json(args.json)
            self.about["processes"] += 1
        else:
            self.about = self._new_facts()
        bench.copy_bandwidth, bench.tflops = self.about["copy_gbytes_per_s"], self.about["bf16_tflops"]
        done = set(self.about["done"])
        self.units = [unit for unit in units if unit.key not in done]

    def _new_facts(self) -> dict[str, Any]:
        args = self.args
        about = facts(args.device) | cuda_ceilings(args.device)
        return about | {
            "protocol": "CUDA graph replay, cold L2: benchmarks/README.md",
            "group_size": args.group, "total_mb": args.total_mb, "least_copies": LEAST_COPIES,
            "seconds_per_timing": args.seconds, "budget_s": args.budget_s,
            "backends": self.bench.backends, "peers": self.bench.reasons,
            "processes": 1, "done": [], "left_out": [], "complete": False,
        }  # fmt: skip

    def run(self) -> int:
        """All units that are left; the exit code."""
        self._print_head()
        self.about["left_out"] = [unit.key for unit in self.units]
        self._write()
        try:
            left = self.bench.run(self.units, self.args.unit_s, self._after)
        except Broken as error:
            print(f"CUDA context lost: {error}", flush=True)
            return self._again()
        self.about["complete"] = not left
        self._write()
        if self.args.plot:
            reason = plot(self.about | {"results": [vars(row) for row in self.rows]}, self.args.plot)
            print(f"plot: {reason or self.args.plot}")
        print(f"{len(self.about['done'])} layers in {time.monotonic() - self.started:.0f} s, {len(left)} left out")
        failed = [row for row in self.rows if row.layer.startswith("packed") and row.reason]
        return int(bool(failed) or not any(row.us_median for row in self.rows))

    def _after(self, unit: Unit, rows: list[GpuRow]) -> None:
        self.rows += rows
        set_ratios(self.rows)
        for row in rows:
            print(gpu_line(row), flush=True)
        self.about["done"].append(unit.key)
        self.about["left_out"].remove(unit.key)
        self._write()

    def _write(self) -> None:
        write_json(self.args.json, self.about, self.rows)

    def _again(self) -> int:
        """Start this program anew for the rest of the plan, with the rest of the time."""
        budget = self.args.budget_s - (time.monotonic() - self.started)
        if not self.args.json or budget < 10 or self.about["processes"] >= RESUMED:
            return 1
        words = [*self.words, "--resume", "--budget-s", f"{budget:.0f}"]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, str(Path(__file__).with_name("gemm.py")), *words])

    def _print_head(self) -> None:
        about = self.about
        print(f"{', '.join(about['gpus'])}, driver {about.get('driver')}, commit {about['commit']}")
        print(
            f"copy {about['copy_gbytes_per_s']:.0f} GB/s, read {about['read_gbytes_per_s']:.0f} GB/s, "
            f"bf16 product {about['bf16_tflops']:.0f} TFLOP/s"
        )
        for name, reason in (self.bench.backends | self.bench.reasons).items():
            print(f"{name}: {reason or 'available'}")
        print(f"{'shape':18} {'M':>4} {'layer':20} {'x':8} {GPU_HEADS}", flush=True)


def describe(unit: Unit, total_mb: float, group: int) -> str:
    """One line of a plan: what, at which M, bytes of one weight and copies of it where they are known beforehand."""
    tokens = ",".join(map(str, unit.tokens))
    nbytes = 0
    for part in parts_of(unit.shape):
        rows, cols = SHAPES[part]
        layout = make_layout(part, unit.width, group) if unit.mode != "peer" else None
        nbytes += layout.size().total_bytes if layout else sum(rows) * cols * int(unit.width or 16) // 8
    copies = TOKENS[unit.shape][0] if unit.shape in TOKENS else copies_for(nbytes, total_mb, LEAST_COPIES)
    return f"{unit.rank:4.1f} {unit.shape:18} {unit.name:20} M={tokens} {copies} x {nbytes / 1e6:.1f} MB"


def dry_run(units: Sequence[Unit], peers: dict[str, Peer], args: argparse.Namespace) -> int:
    """Print the plan, then make, check and time every width at a small size on the CPU. 1 when one is wrong."""
    reasons = {name: peer.why_unavailable() for name, peer in peers.items()}
    for name, reason in reasons.items():
        print(f"{name}: {reason or 'available'}")
    units = without_absent(units, {name: reason for name, reason in reasons.items() if reason != NO_DEVICE})
    for unit in units:
        print(describe(unit, args.total_mb, args.group))
    SHAPES["small"] = ((SMALL_ROWS // 3,) * 3, SMALL_COLS)
    modes = [*(("packed", width) for width in DRY_WIDTHS), ("apart", DRY_WIDTHS[-1]), ("same bytes", DRY_WIDTHS[-1])]
    small = [Unit("small", mode, f"{mode} {width}", width, torch.bfloat16, SMALL_TOKENS) for mode, width in modes]
    dense = [peers[name] for name in DENSE if name in peers]
    small += [Unit("small", "peer", peer.name, "", peer.dtype, SMALL_TOKENS, peer.name) for peer in dense]
    bench = Bench(torch.device("cpu"), args.group, 0.1, 0.001, peers, {}, EagerRun, 1.0, least_copies=2)
    rows: list[GpuRow] = []
    bench.run(small, args.unit_s, lambda unit, made: rows.extend(made))
    for row in rows:
        print(f"small {row.layer} M={row.tokens}: {row.reason or f'right within {row.error:.1e}'}")
    print(f"dry run: {len(units)} layers planned, {len(rows)} small ones made on the CPU; no figure above is a time")
    return int(any(row.reason for row in rows))
