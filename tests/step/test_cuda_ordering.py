"""Whether the CUDA kernel's blocks wait for one another where they must, without a GPU.

The kernel's source runs with threads for blocks and ``std::atomic`` for tickets and grid barrier,
with the memory orders of its PTX, under ThreadSanitizer. Mutants of it show that this would notice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
from cuda.emulated import HERE, SMALL, compile_copy

Changes = Sequence[tuple[str, str]]

# GCC's way to leave out what the sanitizer's shadow stack is for: fibers switch stacks.
FLAGS = ("-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0")
NO_ACQUIRE = (r"fence\.acq_rel\.gpu", "fence.release.gpu")
MUTANTS: dict[str, Changes] = {
    "tickets order nothing": [(r"atom\.release\.gpu", "atom.relaxed.gpu"), NO_ACQUIRE],
    "tickets release nothing": [(r"atom\.release\.gpu", "atom.relaxed.gpu")],
    "the last ticket acquires nothing": [NO_ACQUIRE],
    "no barrier between the phases": [
        (r"if \(phases == kBoth\) cooperative_groups::this_grid\(\)\.sync\(\);", "")
    ],
    "a block's ticket before its warps are done": [
        (r"__syncthreads\(\);\n( +if \(threadIdx\.x == 0\) last = is_last)", r"\1")
    ],
    "the last of a group reads before its ticket": [
        (
            r"(?s)(  int last = 0;\n.*?)(  const Sums total = warp_total[^\n]*\n)",
            r"\2\1",
        )
    ],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Changes], tuple[int, str]]:
    """Compiles the kernel with changes and runs it: exit status and output."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or sys.platform != "linux" or "clang" in compiler:
        pytest.skip("needs g++ on Linux")
    # Of a random layout of memory the sanitizer of older compilers can make nothing.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    environ = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    folder = tmp_path_factory.mktemp("sanitizer")
    (folder / "empty.cpp").write_text("int main() {}")
    empty = [compiler, *FLAGS, str(folder / "empty.cpp"), "-o", str(folder / "empty")]
    if subprocess.run(empty).returncode or subprocess.run([*fixed, folder / "empty"]).returncode:
        pytest.skip("the compiler has no ThreadSanitizer that runs here")

    def compile_and_run(changes: Changes) -> tuple[int, str]:
        folder = tmp_path_factory.mktemp("ordering")
        program = folder / "ordering"
        main = HERE / "ordering.cpp"
        compile_copy(compiler, folder, program, FLAGS, [*SMALL, *changes], main)
        done = subprocess.run(
            [*fixed, program],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    return compile_and_run


def hashes(output: str) -> dict[str, set[str]]:
    """What each kind of step left behind, over all grids."""
    found: dict[str, set[str]] = {}
    for line in output.splitlines():
        if line.count("|") == 2:
            kind, _, value = line.split("|")
            found.setdefault(kind, set()).add(value)
    return found


def test_grids_that_run_at_once_differ_in_no_bit_and_race_nowhere(run: Callable) -> None:
    status, output = run([])
    assert status == 0, output
    found = hashes(output)
    assert len(found) == 6
    assert all(len(values) == 1 for values in found.values()), output
    for kind in ("lagged", "exact"):
        assert found[kind] == found[f"{kind}, launches"]
    assert len(set.union(*found.values())) == 4


@pytest.mark.slow
@pytest.mark.parametrize("changes", MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_is_noticed(run: Callable, changes: Changes) -> None:
    status, output = run(changes)
    differ = any(len(values) > 1 for values in hashes(output).values())
    assert differ or (status == 66 and "WARNING: ThreadSanitizer: data race" in output), output
