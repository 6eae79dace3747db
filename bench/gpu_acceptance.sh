#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes: build for this GPU, tests,
# sanitizer, benchmarks. Goes on past a part that fails and ends with a table of what passed.
#
#   bench/gpu_acceptance.sh            results go to $OUT, or to bench/results/gpu-<time>
#
# PYTHON chooses the interpreter (default: python3), which needs torch with CUDA, pytest, cmake,
# ninja and pybind11; nvcc has to be found. Exit status: 0 passed, 1 a part failed, 2 no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu-$(date -u +%Y%m%d-%H%M%S)}

capability=$("$PYTHON" - <<'END'
import torch

if torch.cuda.is_available():
    print("%d.%d" % torch.cuda.get_device_capability())
END
)
if [ -z "$capability" ]; then
  echo "gpu_acceptance: NO GPU: $PYTHON's torch finds no CUDA device here; nothing was checked" >&2
  exit 2
fi

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
names=() verdicts=() seconds=()

# part NAME LIMIT COMMAND...: runs the command for at most LIMIT seconds, and not beyond the
# tenth minute of all; output to NAME.log.
part() {
  local name=$1 limit=$2 begun=$SECONDS left=$((590 - SECONDS)) status
  shift 2
  [ "$limit" -lt "$left" ] || limit=$((left > 1 ? left : 1))
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  tail -n 4 "$OUT/$name.log"
  names+=("$name")
  seconds+=($((SECONDS - begun)))
  case $status in
    0) verdicts+=(passed) ;;
    124 | 137) verdicts+=("FAILED: over $limit s") ;;
    *) verdicts+=("FAILED: status $status") ;;
  esac
}

export PYTHONUNBUFFERED=1
tests() { "$PYTHON" -m pytest -q -p no:cacheprovider --device cuda "$@"; }
export -f tests
export PYTHON

sanitizer() {
  local tool=$1
  compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name kernel_substring=step_kernel \
    "$PYTHON" tests/cuda/small_steps.py
}
export -f sanitizer

build() {
  TORCH_CUDA_ARCH_LIST=$1 GRADAMP_CUDA=1 \
    "$PYTHON" -m pip install -q --no-build-isolation --no-deps --break-system-packages -e . ||
    TORCH_CUDA_ARCH_LIST=$1 GRADAMP_CUDA=1 "$PYTHON" setup.py build_ext --inplace
  "$PYTHON" -c 'from gradamp_fast import _extension as e; assert e.load(), e.reason(); print(e.built_with())'
}
export -f build

part build 240 bash -c "build $capability"
part doctor 60 "$PYTHON" -m gradamp_fast doctor
part gpu-tests 200 bash -c "tests -m gpu tests"
part memcheck 60 bash -c "sanitizer memcheck"
part racecheck 60 bash -c "sanitizer racecheck"
part synccheck 60 bash -c "sanitizer synccheck"
part bars 200 "$PYTHON" -m bench.gpu_bars --out "$OUT"
part step-tests 180 bash -c "tests tests/test_step.py tests/test_norms.py tests/test_amp.py \
  tests/test_layouts.py tests/test_sketch.py tests/test_checkpoint.py"
part statistics 60 bash -c "tests tests/test_statistics.py"
part benchmarks 150 "$PYTHON" -m bench --quick --device cuda --out "$OUT"

"$PYTHON" - <<'END' | tee "$OUT/machine.json"
import json
import platform
import subprocess

import torch

query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
gpu, driver = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0].split(", ")
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
facts = dict(gpu=gpu, driver=driver, torch=torch.__version__, cuda=torch.version.cuda)
print(json.dumps({**facts, "python": platform.python_version(), "commit": commit or "unknown"}))
END

{
  printf '%-14s %8s  %s\n' part seconds verdict
  for i in "${!names[@]}"; do
    printf '%-14s %8s  %s\n' "${names[$i]}" "${seconds[$i]}" "${verdicts[$i]}"
  done
} | tee "$OUT/acceptance.txt"
! grep -q FAILED "$OUT/acceptance.txt"
