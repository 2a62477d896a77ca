#!/usr/bin/env bash
# Everything that needs a GPU in one command, in less than 9 minutes and without a network: facts, wheels, build, what the
# kernels assume of the device, GPU tests, compute-sanitizer, timings of layers beside their peers.
#
#   benchmarks/run_gpu.sh OUT             OUT gets log.txt, summary.json, probe.json, gemm.json, gemm.png
#   benchmarks/run_gpu.sh --dry-run OUT   every step that needs no device, and a list of those left out
#
# WHEELS=DIR    wheels of peers to install for this run; ./wheels without it, if there is one
# VLLM_LIB=FILE vLLM's stable-ABI library, for Marlin; a name that ends in .xz is unpacked first
# PYTHON=python3, LIMIT_S=530, MPQ_COMMIT=... where the checkout has no history
#
# Every step has a time limit, and one that fails does not stop the others. Needs torch >= 2.11, transformers, pybind11,
# ninja, pytest, nvcc; compute-sanitizer where there is one.
set -uo pipefail

dry=0
if [[ ${1:-} == --dry-run ]]; then
  dry=1
  shift
fi
out=${1:?usage: benchmarks/run_gpu.sh [--dry-run] OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
limit=${LIMIT_S:-530}
scratch=$(mktemp -d)
site=$scratch/site
wheels=${WHEELS:-$PWD/wheels}
log=$out/log.txt
steps=$scratch/steps.tsv
warm= # processes that compile
mkdir -p "$site"
: >"$log"
: >"$steps"
rm -f "$out"/{summary,probe,gemm}.json "$out/gemm.png"
export PYTHONPATH=$PWD PEERS_SITE=$site PYTHONUNBUFFERED=1
export HUMMING_CACHE_DIR=$scratch/humming TRITON_CACHE_DIR=$scratch/triton

finish() {
  [[ -n $warm ]] && kill $warm 2>/dev/null
  rm -rf "$scratch"
}
trap finish EXIT

left() { echo $((limit - SECONDS)); }

note() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$steps"; } # note STEP STATE SECONDS

skip() { # skip STEP REASON
  echo "== $1: left out, $2"
  note "$1" "left out: $2" 0
}

step() { # step NAME SECONDS COMMAND: run with a limit, keep the log, remember what came of it and go on
  local name=$1 seconds=$2 from before state=passed
  shift 2
  before=$SECONDS
  from=$(wc -c <"$log")
  ((seconds > $(left) - 5)) && seconds=$(($(left) - 5))
  if ((seconds < 5)); then
    skip "$name" "no time left"
    return
  fi
  echo "== $name" | tee -a "$log"
  timeout -k 5 "$seconds" bash -c "$*" >>"$log" 2>&1 || state="failed ($?)" # 124: over its time
  note "$name" "$state" $((SECONDS - before))
  tail -c +$((from + 1)) "$log" | tail -n +2 | tail -n "${LINES_SHOWN:-4}"
  echo "   $state, $((SECONDS - before)) s"
}

facts() {
  if ((!dry)); then
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.max.mem --format=csv || return 1
  fi
  "$python" -c 'import sys, torch, transformers; print("python", sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__)'
  "$python" -c 'import triton; print("triton", triton.__version__)' || true
  nvcc --version | tail -n 2
  echo "commit $(git rev-parse HEAD 2>/dev/null || echo "${MPQ_COMMIT:-unknown}")"
  date -u +%Y-%m-%dT%H:%M:%SZ
}

# One by one: a wheel that does not fit must not stop the rest. Into a directory that only gemm.py looks into, and last:
# transformers imports whatever quantization package it finds, and fails where that one misses something.
install_wheels() {
  local wheel bad=0
  for wheel in "$wheels"/*.whl; do
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
      --root-user-action ignore --upgrade --target "$site" "$wheel" && echo "installed $(basename "$wheel")" || bad=1
  done
  return $bad
}

build() { # for the device that is there alone: the others' code would cost minutes
  local arch=90
  if ((!dry)); then
    arch=$("$python" -c 'import torch; m, n = torch.cuda.get_device_capability(); print(f"{m}{n}")') || return 1
  fi
  MPQ_CUDA_ARCHS=${MPQ_CUDA_ARCHS:-$arch} "$python" setup.py -q build_ext --inplace || return 1
  "$python" -c 'from mpq_kernels.backends import cuda; print("CUDA kernels:", cuda.why_unavailable() or "work")'
}

compile_probe() {
  local arch=90a
  if ((!dry)); then
    arch=$("$python" -c 'import torch; m, n = torch.cuda.get_device_capability(); print(f"{m}{n}" + ("a" if m == 9 else ""))') || return 1
  fi
  nvcc -O3 -std=c++17 -gencode "arch=compute_$arch,code=sm_$arch" benchmarks/gpu/probe.cu -o "$scratch/probe"
}

probe() {
  compile_probe || return 1
  "$scratch/probe" >"$out/probe.json" || return 1
  cat "$out/probe.json"
}

sanitize() { # SECONDS: the three tools at once, each over the same cases and over the probe's products
  local tool bad=0 verdicts=
  for tool in memcheck racecheck synccheck; do
    {
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$scratch/probe" --quick || exit 1
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" benchmarks/gpu/sanitize.py --budget-s $(($1 - 35))
    } >"$scratch/$tool.log" 2>&1 &
    eval "pid_$tool=$!"
  done
  for tool in memcheck racecheck synccheck; do
    local pid=pid_$tool state=passed
    wait "${!pid}" || { state=failed; bad=1; }
    tail -n 200 "$scratch/$tool.log"
    verdicts+="$tool: $state, $(tail -n 2 "$scratch/$tool.log" | tr '\n' ' ')"$'\n'
  done
  printf '%s' "$verdicts"
  return $bad
}

imports() {
  "$python" - <<'PY'
import importlib, pkgutil
import benchmarks, mpq_kernels
names = [m.name for p in (mpq_kernels, benchmarks) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
names = [name for name in names if name.rpartition(".")[2] not in ("__main__", "_ops", "_cuda")]  # no modules
for name in names:
    importlib.import_module(name)
print(len(names), "modules import")
PY
}

export python site wheels scratch out dry
export -f facts install_wheels build compile_probe probe sanitize imports

step facts 30 facts
if compgen -G "$wheels/*.whl" >/dev/null; then
  step wheels 40 install_wheels
else
  skip wheels "no $wheels/*.whl"
fi
if [[ ${VLLM_LIB:-} == *.xz ]]; then
  step vllm_lib 60 '"$python" -c "import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], \"wb\"))" "$VLLM_LIB" "$scratch/vllm.so"'
  export VLLM_LIB=$scratch/vllm.so
fi
step build 200 build

if ((dry)); then
  if command -v nvcc >/dev/null; then step probe_compiles 90 compile_probe; else skip probe_compiles "no nvcc"; fi
  step imports 60 imports
  step plan 120 '"$python" benchmarks/layers/gemm.py --device cuda --dry-run'
  step cases_on_cpu 120 '"$python" benchmarks/gpu/sanitize.py --device cpu'
  step gpu_tests_collect 120 '"$python" -m pytest tests -q -m gpu --collect-only -p no:cacheprovider'
  for name in probe warm gpu_tests triton_tests sanitize gemm; do skip "$name" "a dry run uses no device"; done
else
  step probe 40 probe
  # Kernels that are compiled at their first call are compiled while the device does little else.
  "$python" benchmarks/layers/gemm.py --device cuda --warm --peers humming --backend cuda --budget-s 150 >"$scratch/warm_humming.log" 2>&1 &
  warm=$!
  "$python" benchmarks/layers/gemm.py --device cuda --warm --peers bf16 --budget-s 150 >"$scratch/warm_triton.log" 2>&1 &
  warm+=" $!"
  step gpu_tests 80 '"$python" -m pytest tests -q -m gpu -p no:cacheprovider --maxfail 20 --ignore tests/backends/triton/test_device.py'
  step triton_tests 60 '"$python" -m pytest tests/backends/triton/test_device.py -q -p no:cacheprovider'
  if command -v compute-sanitizer >/dev/null; then step sanitize 75 "sanitize 75"; else skip sanitize "no compute-sanitizer"; fi
  kill $warm 2>/dev/null
  wait $warm 2>/dev/null
  warm=
  { echo "== warm" && cat "$scratch"/warm_*.log; } >>"$log"
  budget=$(($(left) - 45))
  LINES_SHOWN=2 step gemm $((budget + 30)) \
    "\"\$python\" benchmarks/layers/gemm.py --device cuda --budget-s $budget --json \"\$out/gemm.json\" --plot \"\$out/gemm.png\""
fi

"$python" benchmarks/gpu/summary.py "$out" "$steps"
