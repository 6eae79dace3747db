#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes: build for this GPU, tests,
# sanitizer, benchmarks. Goes on past a part that fails and ends with a table of what passed.
#
#   bench/gpu_acceptance.sh            results go to $OUT, or to bench/results/gpu-<time>
#
# PYTHON chooses the interpreter (default: python3), which needs torch with CUDA, pytest, cmake,
# ninja and pybind11; nvcc has to be found. Exit status: 0 passed, 1 a part failed, 2 no GPU.
#
# Seven files: acceptance.{txt,json,log} for the whole, bars.{json,csv} and cuda.{json,csv}.
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
export PYTHON PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export TORCH_CUDA_ARCH_LIST=$capability GRADAMP_CUDA=1
table=$OUT/acceptance.txt log=$OUT/acceptance.log due=0
: >"$log"
printf '%-14s %8s  %s\n' part seconds verdict >"$table"

# verdict NAME SECONDS WORDS: a line of the table.
verdict() {
  printf '%-14s %8s  %s\n' "$@" >>"$table"
}

# part NAME SHARE COMMAND...: what the parts before left of their shares of the time is this
# one's too; none can take from those behind it.
part() {
  local name=$1 limit begun=$SECONDS status from
  due=$((due + $2)) limit=$((due - SECONDS))
  shift 2
  echo "== $name, at most $limit s" | tee -a "$log"
  from=$(wc -l <"$log")
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 </dev/null
  status=$?
  tail -n "+$((from + 1))" "$log" | tail -n 6
  case $status in
    0) verdict "$name" $((SECONDS - begun)) passed ;;
    124 | 137) verdict "$name" $((SECONDS - begun)) "FAILED: over $limit s" ;;
    *) verdict "$name" $((SECONDS - begun)) "FAILED: status $status" ;;
  esac
}

tests() {
  "$PYTHON" -m pytest -q -p no:cacheprovider -rs --tb=short --maxfail=20 --device cuda "$@"
}
sanitizer() {
  "$SANITIZER" --tool "$1" --error-exitcode 9 --kernel-name kernel_substring=step_kernel \
    "$PYTHON" tests/cuda/small_steps.py
}
build() {
  "$PYTHON" setup.py build_ext --inplace &&
    "$PYTHON" -c 'from gradamp_fast import _extension as e; assert e.load(), e.reason(); print(e.built_with())'
}
export -f tests sanitizer build
SANITIZER=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer)
export SANITIZER

part build 105 bash -c build
part doctor 25 "$PYTHON" -m gradamp_fast doctor
part cuda-tests 105 bash -c "tests -m gpu tests/step/test_{cuda,device}.py \
  tests/compiled/test_cuda_graph_training.py tests/doors/test_traps.py -k 'not triton'"
part bars 90 "$PYTHON" -m bench.gpu_bars --out "$OUT"
for tool in memcheck racecheck synccheck; do
  if [ -n "$SANITIZER" ]; then
    part "$tool" 30 bash -c "sanitizer $tool"
  else
    verdict "$tool" 0 "not run: compute-sanitizer is neither on PATH nor in CUDA_HOME"
  fi
done
part triton-tests 45 bash -c "tests -m gpu tests/step/test_{triton_gpu,device}.py \
  tests/compiled/test_cuda_graph_training.py -k triton"
part benchmarks 50 "$PYTHON" -m bench.parts --out "$OUT"
part step-tests 40 bash -c "tests tests/step/test_{step,norms,amp,statistics,layouts,sketch}.py \
  tests/doors/test_checkpoint.py -k 'not triton'"

timeout 20 "$PYTHON" - "$table" >"$OUT/acceptance.json" <<'END'
import json
import sys

import torch

from bench.results import describe_machine

with open(sys.argv[1]) as table:
    rows = [line.rstrip("\n").split(maxsplit=2) for line in table][1:]
parts = [{"part": name, "seconds": int(took), "verdict": words} for name, took, words in rows]
machine = describe_machine(torch.device("cuda"))
print(json.dumps({"machine": machine, "parts": parts}, indent=1))
print("{name}, driver {driver}, CUDA {cuda}, torch {torch}, commit {commit}".format(**machine),
      file=open(sys.argv[1], "a"))
END
cat "$table"
! grep -q FAILED "$table"
