#!/usr/bin/env bash
# Everything that needs a GPU in one command, in less than 9 minutes and without a network: facts, wheels, build, first
# contact with the device, GPU tests, compute-sanitizer, timings of layers beside their peers, tests that compile.
#
#   benchmarks/run_gpu.sh OUT             OUT gets log.txt, summary.json, first_contact.json, probe.json, gemm.json, gemm.png
#   benchmarks/run_gpu.sh --dry-run       the steps with the most seconds of each; 1 where a file that one needs is missing
#   benchmarks/run_gpu.sh --dry-run OUT   the same, and every step that needs no device
#
# WHEELS=DIR    wheels of peers to install for this run; ./wheels without it, if there is one
# VLLM_LIB=FILE vLLM's stable-ABI library, for Marlin; a name that ends in .xz is unpacked first
# PYTHON=python3, LIMIT_S=530, JOBS=8 processes of tests, MPQ_COMMIT=... where the checkout has no history
#
# Every step has a time limit, and one that fails does not stop the others. Needs torch >= 2.11, transformers, pybind11,
# ninja, pytest (pytest-xdist for tests in several processes), nvcc; compute-sanitizer where there is one.
set -uo pipefail

dry=0
if [[ ${1:-} == --dry-run ]]; then
  dry=1
  shift
fi
out=${1:-}
if [[ -z $out ]] && ((!dry)); then
  echo "usage: benchmarks/run_gpu.sh [--dry-run] OUT" >&2
  exit 2
fi
if [[ -n $out ]]; then
  mkdir -p "$out"
  out=$(cd "$out" && pwd)
fi
cd "$(dirname "$0")/.."

# Steps in their order: the most seconds of each, and the files that it needs. gemm takes what is left.
plan="
facts          15  mpq_kernels/version.py
wheels         20
vllm_lib       20
build         150  setup.py csrc/cuda csrc/torch csrc/cpu csrc/host
first_contact  85  benchmarks/gpu/first_contact.cu benchmarks/gpu/first_contact.py benchmarks/gpu/check.cuh
probe          20  benchmarks/gpu/probe.cu benchmarks/gpu/check.cuh
gpu_tests      50  tests/backends/cuda/test_device.py tests/made/weights.py
triton_tests   40  tests/backends/triton/test_device.py
sanitize       50  benchmarks/gpu/sanitize.py
gemm            0  benchmarks/layers/gemm.py benchmarks/gpu/command.py
alone_tests    45  tests/backends/cuda/test_device.py tests/made/checkpoints.py
summary         5  benchmarks/gpu/summary.py"

seconds_of() { awk -v name="$1" '$1 == name { print $2 }' <<<"$plan"; }

show_plan() { # 1 where a file is missing
  local name seconds files file bad=0 sum=0
  while read -r name seconds files; do
    [[ -z $name ]] && continue
    sum=$((sum + seconds))
    if ((seconds)); then echo "$name: at most $seconds s"; else echo "$name: what is left of ${LIMIT_S:-530} s"; fi
    for file in $files; do
      [[ -e $file ]] && continue
      echo "   missing: $file"
      bad=1
    done
  done <<<"$plan"
  echo "all but gemm: at most $sum s; nothing starts later than ${LIMIT_S:-530} s"
  return $bad
}

if ((dry)); then
  show_plan || exit 1
  [[ -z $out ]] && exit 0
fi

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
rm -f "$out"/{summary,first_contact,probe,gemm}.json "$out/gemm.png"
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

step() { # step NAME COMMAND: run with the plan's limit, keep the log, remember what came of it and go on
  local name=$1 seconds=${SECONDS_MOST:-$(seconds_of "$1")} from before state=passed
  shift
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
  local arch=90 programs=
  compile_programs &
  programs=$!
  if ((!dry)); then
    arch=$("$python" -c 'import torch; m, n = torch.cuda.get_device_capability(); print(f"{m}{n}")') || return 1
  fi
  MPQ_CUDA_ARCHS=${MPQ_CUDA_ARCHS:-$arch} "$python" setup.py -q build_ext --inplace || { wait "$programs"; return 1; }
  wait "$programs" || echo "first_contact.cu or probe.cu does not compile"
  "$python" -c 'from mpq_kernels.backends import cuda; print("CUDA kernels:", cuda.why_unavailable() or "work")'
}

compile_programs() { # those that ask the device itself; at the same time as the library
  local arch=90a name pids= bad=0
  if ((!dry)); then
    arch=$("$python" -c 'import torch; m, n = torch.cuda.get_device_capability(); print(f"{m}{n}" + ("a" if m == 9 else ""))') || return 1
  fi
  for name in first_contact probe; do
    nvcc -O3 -std=c++17 -gencode "arch=compute_$arch,code=sm_$arch" "benchmarks/gpu/$name.cu" -o "$scratch/$name" &
    pids+=" $!"
  done
  for name in $pids; do wait "$name" || bad=1; done
  return $bad
}

first_contact() {
  "$python" benchmarks/gpu/first_contact.py --program "$scratch/first_contact" --budget-s 80 --json "$out/first_contact.json"
}

probe() {
  "$scratch/probe" >"$out/probe.json" || return 1
  cat "$out/probe.json"
}

sanitize() { # SECONDS: the three tools at once, each over the same cases and over the probe's products
  local tool bad=0 verdicts=
  for tool in memcheck racecheck synccheck; do
    {
      # A tensor that torch's allocator cuts from a larger block has no edge that memcheck could see.
      if [[ $tool == memcheck ]]; then export PYTORCH_NO_CUDA_MEMORY_CACHING=1; fi
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

# Files with tests for a device alone: every process of xdist would collect all the others too.
gpu_files() { grep -rl --include='test_*.py' 'mark\.gpu' tests; }

gpu_tests() { # in several processes where xdist is there
  local several=
  "$python" -c 'import xdist' 2>/dev/null && several="-n ${JOBS:-8} --dist worksteal"
  # shellcheck disable=SC2046,SC2086
  "$python" -m pytest $(gpu_files | grep -v triton) -q -m "gpu and not alone" -p no:cacheprovider --maxfail 20 $several
}

alone_tests() { # by themselves, and last: those that compile, or measure the memory of the device
  # shellcheck disable=SC2046
  "$python" -m pytest $(gpu_files | grep -v triton) -q -m "gpu and alone" -p no:cacheprovider
}

export python site wheels scratch out dry
export -f facts install_wheels build compile_programs first_contact probe sanitize imports gpu_files gpu_tests alone_tests

step facts facts
if compgen -G "$wheels/*.whl" >/dev/null; then
  step wheels install_wheels
else
  skip wheels "no $wheels/*.whl"
fi
if [[ ${VLLM_LIB:-} == *.xz ]]; then
  step vllm_lib '"$python" -c "import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], \"wb\"))" "$VLLM_LIB" "$scratch/vllm.so"'
  export VLLM_LIB=$scratch/vllm.so
fi
step build build

if ((dry)); then
  if command -v nvcc >/dev/null; then
    SECONDS_MOST=120 step first_contact_compiles '"$python" benchmarks/gpu/first_contact.py --dry-run'
  else
    skip first_contact_compiles "no nvcc"
  fi
  SECONDS_MOST=60 step imports imports
  SECONDS_MOST=120 step plan '"$python" benchmarks/layers/gemm.py --device cuda --dry-run'
  SECONDS_MOST=120 step cases_on_cpu '"$python" benchmarks/gpu/sanitize.py --device cpu'
  SECONDS_MOST=120 step gpu_tests_collect '"$python" -m pytest $(gpu_files) -q -m gpu --collect-only -p no:cacheprovider'
  for name in first_contact probe warm gpu_tests triton_tests sanitize gemm alone_tests; do
    skip "$name" "a dry run uses no device"
  done
else
  LINES_SHOWN=40 step first_contact first_contact
  step probe probe
  # Kernels that are compiled at their first call are compiled while the device does little else.
  "$python" benchmarks/layers/gemm.py --device cuda --warm --peers humming --backend cuda --budget-s 150 >"$scratch/warm_humming.log" 2>&1 &
  warm=$!
  "$python" benchmarks/layers/gemm.py --device cuda --warm --peers bf16 --budget-s 150 >"$scratch/warm_triton.log" 2>&1 &
  warm+=" $!"
  step gpu_tests gpu_tests
  step triton_tests '"$python" -m pytest tests/backends/triton/test_device.py -q -p no:cacheprovider'
  if command -v compute-sanitizer >/dev/null; then
    step sanitize "sanitize $(seconds_of sanitize)"
  else
    skip sanitize "no compute-sanitizer"
  fi
  kill $warm 2>/dev/null
  wait $warm 2>/dev/null
  warm=
  { echo "== warm" && cat "$scratch"/warm_*.log; } >>"$log"
  budget=$(($(left) - $(seconds_of alone_tests) - 40))
  LINES_SHOWN=2 SECONDS_MOST=$((budget + 30)) step gemm \
    "\"\$python\" benchmarks/layers/gemm.py --device cuda --budget-s $budget --json \"\$out/gemm.json\" --plot \"\$out/gemm.png\""
  step alone_tests alone_tests
fi

"$python" benchmarks/gpu/summary.py "$out" "$steps"
