#!/usr/bin/env bash
# Everything that needs a GPU, in one command, under 9 minutes and without a network: build, facts that the kernels' design
# assumes of the device, tests. Writes logs and JSON into OUT; the last line says what failed.
#
#   benchmarks/run_gpu.sh OUT
#
# Needs what is installed already: torch >= 2.11, transformers, pybind11, ninja, pytest, nvcc.
set -uo pipefail

out=${1:?usage: benchmarks/run_gpu.sh OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=()

step() { # step NAME SECONDS COMMAND: run with a limit, keep the log, remember a failure and go on
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" bash -c "$*" >"$out/$name.log" 2>&1 || failed+=("$name")
  tail -n 4 "$out/$name.log"
}

facts() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv
  python3 -c 'import sys, torch, transformers; print("python", sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__)'
  nvcc --version | tail -n 2
  git rev-parse HEAD 2>/dev/null
  date -u +%Y-%m-%dT%H:%M:%SZ
}

probe() {
  local arch
  arch=$(python3 -c 'import torch; m, n = torch.cuda.get_device_capability(); print(f"{m}{n}" + ("a" if m == 9 else ""))')
  nvcc -O3 -std=c++17 -gencode "arch=compute_$arch,code=sm_$arch" benchmarks/probe.cu -o "$out/probe" || return 1
  "$out/probe" >"$out/probe.json" || return 1
  cat "$out/probe.json"
}

sanitize() {
  local tool
  for tool in memcheck racecheck synccheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$out/probe" --quick || return 1
  done
}

export out
export -f facts probe sanitize

step facts 60 facts
step build 200 python3 setup.py -q build_ext --inplace
step probe 90 probe
step sanitize 90 sanitize
step gpu_tests 120 python3 -m pytest tests/test_gpu.py -m gpu -p no:cacheprovider
step tests 200 python3 -m pytest tests -q -x -p no:cacheprovider --ignore tests/test_cpu_kernels.py
rm -f "$out/probe"

python3 - "$out" "${failed[@]+"${failed[@]}"}" <<'PY'
import json, pathlib, sys
out, failed = pathlib.Path(sys.argv[1]), sys.argv[2:]
logs = {p.stem: p.read_text(errors="replace").strip().splitlines()[-1:] for p in sorted(out.glob("*.log"))}
probe = out / "probe.json"
summary = {"failed": failed, "last_lines": logs, "probe": json.loads(probe.read_text()) if probe.exists() else None}
(out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
PY
if ((${#failed[@]})); then
  echo "failed: ${failed[*]} (logs in $out)"
  exit 1
fi
echo "all passed (logs in $out)"
