"""Packing: how fast each quantizer reads its input, how much memory it takes, and whether kills lose anything.

    python benchmarks/models/packing.py speed  --json benchmarks/results/packing_NAME.json
    python benchmarks/models/packing.py memory --json benchmarks/results/packing_NAME.json --work /tmp
    python benchmarks/models/packing.py kills  --json benchmarks/results/packing_NAME.json --count 20

The JSON keeps a section for each command; a run replaces its own. Protocol: README.md here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.facts import facts, load_average
from mpq_kernels.calibrate.calibration import Calibration
from mpq_kernels.calibrate.hessians import damped
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.files.safetensors import NewFile, nbytes
from mpq_kernels.files.shards import INDEX_FILE
from mpq_kernels.format.layout import WeightLayout
from mpq_kernels.format.words import pack_weight
from mpq_kernels.packer.pack import pack
from mpq_kernels.plan.plan import Plan
from mpq_kernels.quantize import QUANTIZERS, quantize_weight

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EXAMPLE, TEXT = EXAMPLES / "gutenberg-6m", EXAMPLES / "gutenberg_val.txt"
SIDE, BITS, GROUP = 4096, 4, 64
SLACK = 500_000_000  # of the bound on memory: largest input shard + 2 x largest tensor + this
# A checkpoint of 2.0 G parameters; one line for each kind of tensor of a layer.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
LAYER = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336), "input_layernorm": (4096,), "post_attention_layernorm": (4096,),
}  # fmt: skip
SHARDS = 4


def timed(work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def layer_speed(method: str, repeats: int) -> dict[str, Any]:
    """Quantizing and packing one random layer; a Hessian is given, and its own time listed."""
    weight = (torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * SIDE**-0.5).bfloat16()
    layout = WeightLayout.uniform(SIDE, SIDE, BITS, GROUP, "int")
    hessian, hessian_seconds = None, None
    if QUANTIZERS[method].needs_calibration:
        x = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(2))
        start = time.perf_counter()
        hessian = damped((x.T @ x).double().div_(len(x)), 0.05)
        hessian_seconds = time.perf_counter() - start

    def work() -> None:
        pack_weight(quantize_weight(weight, layout, None, method, "layer", hessian))

    row = speed_row(f"layer {SIDE}x{SIDE}", method, weight.nbytes, timed(work, repeats))
    return row | {"hessian_seconds_of_4096_tokens": hessian_seconds}


def model_speed(method: str, repeats: int) -> dict[str, Any]:
    """`pack` of the example, from its files to finished files on disk; calibration included where there is any."""
    plan = Plan.uniform(EXAMPLE, BITS, GROUP)
    given = Calibration.from_file(TEXT) if QUANTIZERS[method].needs_calibration else None
    source = DenseCheckpoint.open(EXAMPLE)
    packed = [spec for spec in source.linears() if not spec.is_head]
    with tempfile.TemporaryDirectory() as work:
        times = timed(lambda: pack(EXAMPLE, Path(work) / "out", plan, method, given, overwrite=True), repeats)
    return speed_row(EXAMPLE.name, method, sum(source.tensors[spec.tensor].entry.nbytes for spec in packed), times)


def speed_row(what: str, method: str, size: int, times: list[float]) -> dict[str, Any]:
    """MB/s of dense bytes that were quantized, by the median."""
    seconds = statistics.median(times)
    print(f"{what:16} {method:5} {size / 1e6:8.1f} MB {seconds:8.2f} s {size / seconds / 1e6:8.1f} MB/s", flush=True)
    rate = {"mbytes_per_s": size / seconds / 1e6, "seconds": times}
    return {"input": what, "quantizer": method, "bits": BITS, "group_size": GROUP, "input_bytes": size} | rate


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Every quantizer on a layer and on a model."""
    return {"rows": [run(method, args.repeats) for run in (layer_speed, model_speed) for method in args.quantizers]}


def write_checkpoint(path: Path) -> None:
    """A random Llama of CONFIG in SHARDS files, tensor by tensor."""
    path.mkdir()
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(8) for name, shape in LAYER.items()}
    vocab = (CONFIG["vocab_size"], CONFIG["hidden_size"])
    ends = {"model.norm.weight": (4096,), "lm_head.weight": vocab}
    names = list(shapes := {"model.embed_tokens.weight": vocab} | shapes | ends)
    total = sum(nbytes((torch.bfloat16, shape)) for shape in shapes.values())
    placed, held = {}, 0
    for name in names:
        placed[name] = f"model-{held * SHARDS // total + 1:05}-of-{SHARDS:05}.safetensors"
        held += nbytes((torch.bfloat16, shapes[name]))
    generator = torch.Generator().manual_seed(0)
    for file_name in sorted(set(placed.values())):
        specs = {name: (torch.bfloat16, shapes[name]) for name in names if placed[name] == file_name}
        with NewFile.create(path / file_name, specs) as file:
            for name, (_, shape) in specs.items():
                for start in range(0, nbytes((torch.bfloat16, shape)) // 2, 2**24):
                    count = min(2**24, nbytes((torch.bfloat16, shape)) // 2 - start)
                    file.write(name, start, (torch.randn(count, generator=generator) * 0.02).bfloat16())
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": placed}))
    (path / "config.json").write_text(json.dumps(CONFIG))


def memory_now() -> dict[str, int]:
    """Bytes resident now and at most so far, of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {key: int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM", "RssAnon", "RssFile")}


def pack_and_report(model: Path, out: Path, quantizer: str) -> None:
    """In a process of its own: pack, and print what it took."""
    plan = Plan.uniform(model, BITS, GROUP)
    before = memory_now()
    start = time.perf_counter()
    report = pack(model, out, plan, quantizer)
    seconds = time.perf_counter() - start
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = sum(module.bytes * 8 / module.bpw for module in report.modules)
    rate = weights * 2 / seconds / 1e6
    print(json.dumps({"before": before, "after": memory_now(), "ru_maxrss": maximum, "seconds": seconds, "rate": rate}))


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of packing a checkpoint of four shards, 4 GB."""
    free = shutil.disk_usage(args.work).free
    if free < 8 * 10**9:
        raise SystemExit(f"{args.work}: 8 GB are needed and {free / 1e9:.1f} are free")
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        model, out = Path(name) / "model", Path(name) / "out"
        if args.models is None:
            write_checkpoint(model)
        else:
            model = args.models[0]
        source = DenseCheckpoint.open(model)
        shard = max(file.stat().st_size for file in source.files.files)
        tensor = max(stored.entry.nbytes for stored in source.tensors.values())
        total = sum(file.stat().st_size for file in source.files.files)
        command = [sys.executable, __file__, "child", str(model), str(out), args.quantizers[0]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        packed = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    peak, bound = found["after"]["VmHWM"], shard + 2 * tensor + SLACK
    before, count = found["before"]["VmRSS"], len(source.files.files)
    print(f"{total / 1e9:.2f} GB, {count} shards, largest {shard / 1e6:.0f} MB, largest tensor {tensor / 1e6:.0f} MB")
    print(f"peak {peak / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB; {before / 1e6:.0f} MB before packing")
    print(f"{found['seconds']:.1f} s, {found['rate']:.0f} MB/s of packed weights in bf16")
    return {
        "quantizer": args.quantizers[0], "input_bytes": total, "largest_shard_bytes": shard, "output_bytes": packed,
        "shards": count,
        "largest_tensor_bytes": tensor, "bound_bytes": bound, "peak_bytes": peak, "within": peak <= bound,
        "ru_maxrss_bytes": found["ru_maxrss"], "resident_before_bytes": before,
        "seconds": found["seconds"], "mbytes_per_s": found["rate"],
    }  # fmt: skip


def digests(path: Path) -> dict[str, str]:
    """File name -> SHA-256."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


def fork_pack(model: Path, out: Path, plan: Plan, quantizer: str) -> int:
    """Id of a child that packs with resume=True and leaves its report's counts beside `out`."""
    child = os.fork()
    if child:
        return child
    try:
        report = pack(model, out, plan, quantizer, resume=True)
        out.with_suffix(".json").write_text(json.dumps([report.resumed, report.parts]))
        os._exit(0)
    finally:
        os._exit(1)  # only reached by an exception, which Python has no chance to print


def kill_rows(model: Path, work: Path, args: argparse.Namespace, chance: random.Random) -> Iterator[dict[str, Any]]:
    """Kill at a random moment, resume, compare; what ends before it is killed does not count."""
    plan = Plan.uniform(model, BITS, 16)
    wanted = work / "wanted"
    start = time.perf_counter()
    if os.waitpid(fork_pack(model, wanted, plan, args.quantizers[0]), 0)[1]:
        raise SystemExit(f"{model}: cannot be packed")
    whole = time.perf_counter() - start
    count = 0
    while count < args.count:
        out = work / f"out{count}"
        child = fork_pack(model, out, plan, args.quantizers[0])
        delay = chance.uniform(0, whole)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not out.exists():
            code = os.waitpid(fork_pack(model, out, plan, args.quantizers[0]), 0)[1]
            resumed, parts = json.loads(out.with_suffix(".json").read_text()) if code == 0 else (0, 0)
            same = code == 0 and digests(out) == digests(wanted)
            row = {"model": model.name, "killed_after_s": delay, "of_s": whole, "finished": resumed, "parts": parts}
            print(f"{model.name:16} killed after {delay:6.2f} s, {resumed:4} of {parts} parts, {same=}", flush=True)
            yield row | {"same": same}
            count += 1
        shutil.rmtree(out, ignore_errors=True)
        out.with_suffix(".json").unlink(missing_ok=True)


def kills(args: argparse.Namespace) -> dict[str, Any]:
    """Random kills -9, each resumed; all children are forks of this process, which runs no threads of its own."""
    torch.set_num_threads(1)
    chance = random.Random(args.seed)
    rows = []
    for model in args.models or [EXAMPLE]:
        DenseCheckpoint.open(model).linears()  # imports what building a model needs, once for all children
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            rows += list(kill_rows(model, Path(work), args, chance))
            left = [name for name in os.listdir(work) if name.startswith(".")]
            if left:
                raise SystemExit(f"left behind: {left}")
    good = sum(row["same"] for row in rows)
    print(f"{good} of {len(rows)} killed runs ended with the same files")
    return {"quantizer": args.quantizers[0], "seed": args.seed, "same": good, "kills": len(rows), "rows": rows}


SECTIONS = {"speed": speed, "memory": memory, "kills": kills}


def main() -> int:
    """Run one section; 1 when what it shows is not as it should be."""
    if sys.argv[1:2] == ["child"]:
        pack_and_report(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--json", type=Path, help="file to write or to bring up to date")
    parser.add_argument(
        "--quantizers", help="speed: which; memory, kills: the first.  [default: all of one weight; rtn]"
    )
    parser.add_argument("--repeats", type=int, default=3, help="speed: runs of each, the median counts")
    parser.add_argument("--work", type=Path, help="memory, kills: where to write.  [default: the system's]")
    parser.add_argument("--count", type=int, default=20, help="kills: of each model")
    parser.add_argument(
        "--models", type=Path, nargs="+", help="dense directories.  [default: kills: the example; memory: a new one]"
    )
    parser.add_argument("--seed", type=int, default=0, help="kills: of the random moments")
    args = parser.parse_args()
    single = ",".join(name for name, row in QUANTIZERS.items() if not row.whole_model)
    args.quantizers = (args.quantizers or (single if args.section == "speed" else "rtn")).split(",")
    args.work = args.work or Path(tempfile.gettempdir())
    about = facts(torch.device("cpu"))
    result = SECTIONS[args.section](args)
    if args.json is not None:
        data = json.loads(args.json.read_text()) if args.json.exists() else {}
        data[args.section] = about | {"load_average_after": load_average()} | result
        part = args.json.with_name(args.json.name + ".part")
        part.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
        part.replace(args.json)
    return int(not result.get("within", True) or result.get("same") != result.get("kills"))


if __name__ == "__main__":
    sys.exit(main())
