#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build for this GPU, tests, sanitizer, benchmarks.
# Each part's result is written as it ends, so that a run cut off at any time leaves what was done.
#
#   bench/gpu_acceptance.sh             all parts; results go to $OUT, or to bench/results/gpu-<time>
#   bench/gpu_acceptance.sh bars ncu    these parts alone, with what they need
#
# PYTHON chooses the interpreter (default: python3), which needs torch with CUDA, pytest, cmake,
# ninja and pybind11; with pytest-xdist the tests take a quarter of the time. nvcc has to be found.
# ACCEPTANCE_SECONDS (default: 540) is the time for everything; each part is cut at a share of it.
# Exit status: 0 passed, 1 a part failed, 2 no GPU.
#
# Seven files: acceptance.{txt,json,log} for the whole, bars.{json,csv} and cuda.{json,csv}.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu-$(date -u +%Y%m%d-%H%M%S)}

capability=$("$PYTHON" -c '
import torch
if torch.cuda.is_available():
    print("%d.%d" % torch.cuda.get_device_capability())')
if [ -z "$capability" ]; then
  echo "gpu_acceptance: NO GPU: $PYTHON's torch finds no CUDA device here; nothing was checked" >&2
  exit 2
fi

export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export TORCH_CUDA_ARCH_LIST=$capability GRADAMP_CUDA=1
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin  # compute-sanitizer and ncu
exec "$PYTHON" -m bench.gpu.acceptance --out "$OUT" "$@"
