"""The acceptance on a GPU, dry: stand-ins play the interpreter, the GPU, nvcc and the tools."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import shapes
from bench.gpu import acceptance, bars, subjects
from bench.workload import Workload

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_acceptance.sh"

# What each part says where all is well, by a word of its command line.
SAYS = {
    "get_device_capability": "9.0",
    "setup.py": "copying the extension",
    "e.load()": "built with torch",
    "describe_machine": '{"name": "a stand-in"}',
    "small_steps": "========= ERROR SUMMARY: 0 errors",
    "pytest": "3 passed, 1 skipped in 0.01s",
    "bench.gpu.bars": "3 passed, 0 missed, 0 not judged",
    "doctor": "No problem found.",
    "bench.parts": "1 row",
}

INTERPRETER = """#!/bin/bash
# Plays every part; the scheduler itself runs for good.
case "$*" in *bench.gpu.acceptance*) exec {python} "$@" ;; esac
said=${{*//$'\\n'/ }}
echo "$(date +%s.%N) begin $said" >>{folder}/diary
{odd}
case "$*" in
{says}
esac
echo "$(date +%s.%N) end $said" >>{folder}/diary
"""


class Stage:
    """A folder of stand-ins; ``odd`` is what the interpreter does before anything else."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.tools = folder / "cuda" / "bin"
        self.tools.mkdir(parents=True)
        self.write(self.tools / "compute-sanitizer", '#!/bin/bash\nexec "${@: -2}"\n')
        self.write(self.tools / "ncu", "#!/bin/bash\n")

    def write(self, file: Path, text: str) -> None:
        file.write_text(text)
        file.chmod(0o755)

    def start(self, *parts: str, odd: str = "", seconds: str = "60") -> subprocess.Popen[str]:
        says = "\n".join(f"*'{word}'*) echo '{line}' ;;" for word, line in SAYS.items())
        self.write(
            self.folder / "python",
            INTERPRETER.format(python=sys.executable, folder=self.folder, odd=odd, says=says),
        )
        environment = {
            **os.environ,
            "PYTHON": str(self.folder / "python"),
            "OUT": str(self.out),
            "CUDA_HOME": str(self.tools.parent),
            "ACCEPTANCE_SECONDS": seconds,
        }
        return subprocess.Popen(
            [SCRIPT, *parts],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *parts: str, odd: str = "", seconds: str = "60") -> tuple[int, str]:
        process = self.start(*parts, odd=odd, seconds=seconds)
        printed, _ = process.communicate(timeout=600)
        return process.returncode, printed

    @property
    def verdicts(self) -> dict[str, str]:
        record = json.loads((self.out / "acceptance.json").read_text())
        return {part["part"]: part["verdict"] for part in record["parts"]}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_everything_passes(stage: Stage) -> None:
    status, printed = stage.run()
    assert status == 0, printed
    names = [part.name for part in acceptance.all_parts(stage.out)]
    assert list(stage.verdicts) == names
    assert all(verdict.startswith("passed") for verdict in stage.verdicts.values())
    assert stage.verdicts["cuda-tests"] == f"passed: {SAYS['pytest']}"
    record = json.loads((stage.out / "acceptance.json").read_text())
    assert record["machine"] == {"name": "a stand-in"}
    written = sorted(file.name for file in stage.out.iterdir())
    assert written == ["acceptance.json", "acceptance.log", "acceptance.txt"]
    assert "cuda-tests| 3 passed" in (stage.out / "acceptance.log").read_text()
    assert len((stage.out / "acceptance.txt").read_text().splitlines()) == len(names) + 1


def test_timings_run_alone_and_tests_do_not(stage: Stage) -> None:
    stage.run(odd="sleep 1")
    spans: dict[str, list[float]] = {}
    for line in (stage.folder / "diary").read_text().splitlines():
        at, _, what = line.split(" ", 2)
        spans.setdefault(what, []).append(float(at))
    ended = {what: span for what, span in spans.items() if len(span) == 2}
    timings = [w for w in ended if " rates " in w or "bench.parts" in w or "dram_bytes" in w]
    assert len(timings) == 3
    for timing in timings:
        begin, end = ended[timing]
        others = [span for what, span in ended.items() if what != timing]
        assert all(other[1] <= begin or other[0] >= end for other in others), timing
    tests, launches = (
        next(s for w, s in ended.items() if word in w) for word in ("test_cuda.py", "launches")
    )
    assert tests[0] < launches[1]
    assert launches[0] < tests[1]


def test_a_build_that_fails_takes_along_what_needs_it_alone(stage: Stage) -> None:
    status, printed = stage.run(odd='case "$*" in *setup.py*) echo no nvcc; exit 3 ;; esac')
    assert status == 1
    assert stage.verdicts["build"] == "FAILED: status 3: no nvcc"
    assert stage.verdicts["load"] == "FAILED: not run, as build did not pass"
    assert stage.verdicts["bars"] == "FAILED: not run, as load did not pass"
    assert stage.verdicts["triton-tests"].startswith("passed")
    assert "    no nvcc" in printed


def test_tools_that_are_missing_are_left_out(stage: Stage) -> None:
    for tool in stage.tools.iterdir():
        tool.unlink()
    status, printed = stage.run()
    assert status == 0, printed
    left_out = {name for name, verdict in stage.verdicts.items() if "neither on PATH" in verdict}
    assert left_out == {"memcheck", "racecheck", "synccheck", "ncu"}


@pytest.mark.parametrize(
    ("said", "part"),
    [("4 skipped in 0.01s", "cuda-tests"), ("== ERROR SUMMARY: 10 errors", "memcheck")],
)
def test_what_checked_nothing_has_not_passed(stage: Stage, said: str, part: str) -> None:
    word = "pytest" if part == "cuda-tests" else "small_steps"
    status, _ = stage.run(part, odd=f"case \"$*\" in *{word}*) echo '{said}'; exit 0 ;; esac")
    assert status == 1
    assert stage.verdicts == {
        "build": "passed",
        "load": "passed",
        part: f"FAILED: nothing was checked: {said}",
    }


def test_a_part_over_its_time_tells_what_it_found(stage: Stage) -> None:
    """pytest tells its failures when interrupted; the parts behind still have their time."""
    hang = "trap 'echo 1 failed, 2 passed; exit 2' INT; sleep 0.1; while :; do sleep 0.1; done"
    status, _ = stage.run(odd=f'case "$*" in *test_cuda.py*) {hang} ;; esac', seconds="30")
    assert status == 1
    assert stage.verdicts["cuda-tests"].startswith("FAILED: over its time, ")
    assert stage.verdicts["cuda-tests"].endswith("1 failed, 2 passed")
    assert stage.verdicts["bars"].startswith("passed")


def runs(process: int) -> bool:
    """Whether it does; one that has ended may still stand in the table, unread."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_part_that_does_not_listen_is_killed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "GRACE", 0.3)
    command = ["bash", "-c", "trap '' INT; sleep 60 & echo $!; wait; sleep 60"]
    part = acceptance.Part("deaf", 0.2, command, after=())
    late = acceptance.Part("late", 0.1, ["true"], after=("deaf",))
    stage.out.mkdir()
    begun = time.monotonic()
    assert not acceptance.Acceptance([part, late], stage.out, 20.0).run()
    assert time.monotonic() - begun < 50  # not the minute that it would sleep
    assert part.verdict.startswith("FAILED: over its time")
    assert late.verdict == "FAILED: no time was left"
    assert not runs(int(part.lines[0]))


def test_cut_from_outside_it_leaves_what_was_done(stage: Stage) -> None:
    process = stage.start(odd='case "$*" in *test_cuda.py*) echo dots; sleep 60 ;; esac')
    for _ in range(2000):
        time.sleep(0.1)
        if stage.out.exists() and "dots" in (stage.out / "acceptance.log").read_text():
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    assert stage.verdicts["build"] == "passed"
    assert stage.verdicts["cuda-tests"] == "FAILED: cut off from outside"
    assert stage.verdicts["ncu"] == "FAILED: not reached"


def test_parts_are_chosen_by_name(stage: Stage) -> None:
    status, _ = stage.run("launches")
    assert status == 0
    assert list(stage.verdicts) == ["build", "load", "launches"]
    status, printed = stage.run("lunches")
    assert status == 2
    assert "there is no part 'lunches'; there are build, load," in printed
    assert "ACCEPTANCE_SECONDS=soon is not a number" in stage.run(seconds="soon")[1]


def test_without_a_gpu_it_fails_and_leaves_nothing(stage: Stage) -> None:
    status, printed = stage.run(odd='case "$*" in *get_device_capability*) exit 0 ;; esac')
    assert status == 2
    assert "NO GPU" in printed
    assert not stage.out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_torch_is_asked_for_the_gpu(stage: Stage) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(stage.out)}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "NO GPU" in done.stderr


def test_what_the_parts_name_is_there(stage: Stage) -> None:
    """Files, and options of bars."""
    for part in acceptance.all_parts(stage.out):
        for word in part.command:
            assert not word.endswith(".py") or (ROOT / word).exists(), word
        if "--only" in part.command:
            assert set(part.command[part.command.index("--only") + 1 :]) <= set(bars.PARTS)


@pytest.mark.parametrize("there", [True, False])
def test_tests_run_side_by_side_where_xdist_is(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "find_spec", lambda name: name if there else None)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    part = acceptance.tests("t", 0.5, "step", "cuda", 8)
    assert (part.command[-3:-1] == ["-n", "8"]) is there
    assert part.environment == {"OMP_NUM_THREADS": "1"}


# ---- the bars ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_yardsticks_move_what_they_should(dtype: torch.dtype) -> None:
    small: shapes.Shapes = {"a.weight": (64, 33), "b.weight": (2048,)}
    work = Workload(small, dtype, torch.device("cpu"), 0.5, 1, False)
    for kind in (subjects.MemoryCopy, subjects.KernelCopy):
        copy = kind(work, 1.5)
        copy.run()
        moved = copy.elsewhere if kind is subjects.MemoryCopy else ~copy.elsewhere
        assert torch.equal(moved, copy.integers[: copy.count])
        assert 2 * copy.elsewhere.nbytes == pytest.approx(1.5 * copy.flat.nbytes, abs=8)
    clip = subjects.UnscaleAndClip(work, max_norm=0.1)
    clip.take(work.sets[0], 1.0)
    clip.run()
    assert torch.cat(work.sets[0].flats).float().norm() == pytest.approx(0.1, rel=2e-2)
    assert clip.name == ("unscale_ + clip" if dtype == torch.float32 else "foreach_mul_ + clip")


def test_bars_are_added_to_those_of_other_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[bars.Bar]:
        yield bars.beside(2, "case", "kernel copy / lagged", 0.8)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(
        bars,
        "PARTS",
        {"good": lambda: iter([bars.at_most(1, "case", "kernels", 1, 1, "")]), "broken": broken},
    )
    for name in ("good", "broken", "broken"):
        found = list(bars.measured([name]))
        bars.save(bars.earlier(tmp_path, [name]) + found, {}, tmp_path)
    record = json.loads((tmp_path / "bars.json").read_text())["bars"]
    assert [(bar["part"], bar["passed"]) for bar in record] == [
        ("good", True),
        ("broken", None),
        ("broken", False),
    ]
    assert "MISSED RuntimeError: out of memory" in bars.show(found[1])
    assert "not judged: for comparison" in bars.show(found[0])
    assert len((tmp_path / "bars.csv").read_text().splitlines()) == 4
