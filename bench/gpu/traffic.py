"""Bytes that a step moves to and from the GPU's memory, as ncu counts them.

python -m bench.gpu.traffic CASE     a few steps of one case, for ncu to look at
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from dataclasses import dataclass

import torch

from bench.baselines import Fused, amplifier_options
from bench.shapes import MODELS, Shapes
from bench.workload import FACTOR, Workload

FP32, BF16 = torch.float32, torch.bfloat16


def wide(count: int) -> Shapes:
    """``count`` layers of 4096 x 4096."""
    return {f"layer{i}.weight": (4096, 4096) for i in range(count)}


CASES: dict[str, tuple[Shapes, torch.dtype, float, str]] = {
    f"{name} {kind} f={fraction:g} {timing}": (shapes, dtype, fraction, timing)
    for timing in ("lagged", "exact")
    for fraction in (0.25, 1.0)
    for name, kind, shapes, dtype in (
        ("8 x 4096^2", "fp32", wide(8), FP32),
        ("16 x 4096^2", "bf16", wide(16), BF16),
        ("resnet18", "bf16", MODELS["resnet18"](), BF16),
    )
    if timing == "exact" or name != "resnet18"
}


def workload(case: str) -> Workload:
    shapes, dtype, fraction, _ = CASES[case]
    return Workload(shapes, dtype, torch.device("cuda"), fraction, 1, False)


@dataclass(frozen=True)
class Traffic:
    """Of one step: bytes to and from memory (None if not counted, ``note`` says why)."""

    moved: float | None
    gradients: int
    amplified: float
    note: str = ""


def count(case: str) -> Traffic:
    """Runs ncu on a few steps of the case, of which it counts the third."""
    work = workload(case)
    size, amplified = work.gradient_bytes, work.amplified_fraction
    ncu = shutil.which("ncu")
    if ncu is None:
        return Traffic(None, size, amplified, "ncu is not on PATH")
    command = [ncu, "--csv", "--print-units", "base", "--clock-control", "none"]
    command += ["--metrics", "dram__bytes_read.sum,dram__bytes_write.sum"]
    command += ["--kernel-name", "regex:step_kernel", "--launch-skip", "2", "--launch-count", "1"]
    command += [sys.executable, "-m", "bench.gpu.traffic", case]
    result = subprocess.run(command, capture_output=True, text=True)
    rows = [line for line in result.stdout.splitlines() if line.startswith('"')]
    if result.returncode or len(rows) < 3:
        words = (result.stdout + result.stderr).replace("\n", " ")
        return Traffic(None, size, amplified, f"ncu gave nothing: {words[-200:]}")
    moved = sum(float(row["Metric Value"].replace(",", "")) for row in csv.DictReader(rows))
    return Traffic(moved, size, amplified)


def main(case: str) -> None:
    work = workload(case)
    subject = Fused(work, "cuda", amplifier_options(CASES[case][3], work))
    for step in range(4):
        subject.take(work.sets[0], 1.0 / FACTOR if step % 2 else FACTOR)
        subject.run()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
