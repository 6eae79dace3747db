"""The examples are short, and run as they stand on a CPU."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEED_TORCHRUN = ("ddp.py", "fsdp2.py")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def missing(example: Path) -> list[str]:
    """Libraries it imports that are not installed."""
    found = set()
    for node in ast.walk(ast.parse(example.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return sorted(name for name in {name.split(".")[0] for name in found} if not find_spec(name))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_short(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 60


@pytest.mark.parametrize(
    "example", [e for e in EXAMPLES if e.name not in NEED_TORCHRUN], ids=lambda path: path.stem
)
def test_runs(example: Path, tmp_path: Path) -> None:
    if names := missing(example):
        pytest.skip(f"not installed: {', '.join(names)}")
    done = subprocess.run(
        [sys.executable, example], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "it shows nothing"
