"""The examples are short, and run as they stand on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cases import missing_libraries

ROOT = Path(__file__).resolve().parents[2]
NEED_TORCHRUN = ("ddp.py", "fsdp2.py")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_short(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 60


@pytest.mark.slow
@pytest.mark.parametrize(
    "example", [e for e in EXAMPLES if e.name not in NEED_TORCHRUN], ids=lambda path: path.stem
)
def test_runs(example: Path, tmp_path: Path) -> None:
    if names := missing_libraries(example.read_text()):
        pytest.skip(f"not installed: {', '.join(names)}")
    done = subprocess.run(
        [sys.executable, example], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    if "needs an NVIDIA GPU" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.stdout.strip(), "it shows nothing"
