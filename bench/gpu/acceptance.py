"""Runs the parts of bench/gpu_acceptance.sh: what may run side by side, and timings alone.

The parts stand in the order of their worth. Each has a share of the time by which it is cut, so
that none takes the time of those behind it; what one leaves is the next one's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

PYTHON = os.environ.get("PYTHON", sys.executable)
GRACE = 5.0  # seconds from the interrupt, on which pytest tells its failures, to the kill
TESTS = Path(__file__).resolve().parents[2] / "tests"


@dataclass(eq=False)
class Part:
    """One command and what became of it.

    Attributes:
        by: share of the whole time at which it is cut.
        after: parts that have to have passed.
        alone: nothing runs beside it, for its times count.
        expects: what it has to say at its end: a test run without tests proves nothing.
        tool: a program that it needs; without it the part is left out.
        lines: what it printed last.
    """

    name: str
    by: float
    command: list[str]
    after: tuple[str, ...] = ("load",)
    alone: bool = False
    expects: str = ""
    tool: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    verdict: str = "waiting"
    begun: float = 0.0
    seconds: float = 0.0
    interrupted: float | None = None
    process: subprocess.Popen[str] | None = None
    reader: threading.Thread | None = None
    lines: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.verdict.startswith("passed")

    @property
    def ended(self) -> bool:
        return self.verdict not in ("waiting", "running")

    @property
    def failed(self) -> bool:
        return self.verdict.startswith("FAILED")


def tests(name: str, by: float, files: str, which: str, workers: int, **more: Any) -> Part:
    """pytest on some files, in several processes where pytest-xdist is and cores are enough."""
    workers = min(workers, (os.cpu_count() or 1) // 2)
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", "--tb=short"]
    command += ["--maxfail=20", "--device", "cuda", "-k", which]
    command += ["-n", str(workers)] if workers > 1 and find_spec("xdist") else []
    command += [str(next(TESTS.rglob(f"test_{name}.py"))) for name in files.split()]
    one_thread = {"OMP_NUM_THREADS": "1"}  # else every process takes all cores
    return Part(name, by, command, expects=r"\b[1-9]\d* passed", environment=one_thread, **more)


def sanitizer(tool: str) -> Part:
    """compute-sanitizer on the smallest case. A cooperative launch refused is no error of ours."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command += ["--kernel-name", "kernel_substring=step_kernel"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [PYTHON, str(TESTS / "cuda" / "small_steps.py")]
    return Part(tool, 0.55, command, expects=r"\b0 (errors|hazards)", tool=command[0])


def all_parts(out: Path) -> list[Part]:
    def bars(name: str, by: float, *only: str, tool: str = "", alone: bool = True) -> Part:
        command = [PYTHON, "-m", "bench.gpu.bars", "--out", str(out), "--only", *only]
        return Part(name, by, command, alone=alone, tool=tool)

    load = "from gradamp_fast import _extension as e; assert e.load(), e.reason(); \
print(e.built_with())"
    machine = "import json, torch; from bench.results import describe_machine; \
print(json.dumps(describe_machine(torch.device('cuda'))))"
    return [
        Part("build", 0.4, [PYTHON, "setup.py", "build_ext", "--inplace"], after=()),
        Part("load", 0.45, [PYTHON, "-c", load], after=("build",)),
        tests("cuda-tests", 0.55, "cuda device cuda_graph_training traps", "not triton", 8),
        bars("launches", 0.55, "launches", alone=False),
        *(sanitizer(tool) for tool in ("memcheck", "racecheck", "synccheck")),
        # They need no build: the compilations, which take longest, go beside nvcc's.
        tests("triton-tests", 0.55, "device cuda_graph_training", "triton", 4, after=()),
        Part("machine", 0.55, [PYTHON, "-c", machine]),
        bars("bars", 0.75, "host_time", "rates", "exactness", "clipping", "alignment"),
        tests("triton-cuda", 0.88, "triton_gpu", "test", 2),
        tests("step-tests", 0.88, "statistics step norms amp layouts sketch checkpoint grow "
              "fp16_saturates rounds_and_members", "cuda and not triton", 8),
        Part("doctor", 0.88, [PYTHON, "-m", "gradamp_fast", "doctor"]),
        Part("benchmarks", 0.95, [PYTHON, "-m", "bench.parts", "--out", str(out)], alone=True),
        bars("ncu", 1.0, "dram_bytes", tool="ncu"),
    ]  # fmt: skip


def chosen(parts: list[Part], names: Sequence[str]) -> list[Part]:
    """The parts named and what they need; all of them if none is named."""
    wanted = set(names or (part.name for part in parts))
    for part in reversed(parts):
        if part.name in wanted:
            wanted.update(part.after)
    return [part for part in parts if part.name in wanted]


class Acceptance:
    """Starts parts when they may start, cuts them when their time is over, writes what is known."""

    def __init__(self, parts: list[Part], out: Path, seconds: float) -> None:
        self.parts, self.out, self.seconds = parts, out, seconds
        self.start = time.monotonic()
        self.log = (out / "acceptance.log").open("w")
        self.writing = threading.Lock()

    def now(self) -> float:
        return time.monotonic() - self.start

    def run(self) -> bool:
        """Whether everything passed, but for what a missing program left out."""
        self.save()
        try:
            while not all(part.ended for part in self.parts):
                for part in self.parts:
                    if part.verdict == "running":
                        self.look_at(part)
                self.start_what_may()
                time.sleep(0.05)
        finally:
            for part in self.parts:
                if part.process is not None and part.verdict == "running":
                    self.kill(part)
                    self.end(part, "FAILED: cut off from outside")
                elif part.verdict == "waiting":
                    self.end(part, "FAILED: not reached")
        return not any(part.failed for part in self.parts)

    def start_what_may(self) -> None:
        for part in self.parts:
            if part.verdict == "waiting":
                before = [other for other in self.parts if other.name in part.after]
                running = any(other.verdict == "running" for other in self.parts)
                if hindrance := self.hindrance(part, before):
                    self.end(part, hindrance)
                elif all(other.passed for other in before) and not (part.alone and running):
                    self.begin(part)
            if part.alone and not part.ended:
                return  # nothing overtakes a timing

    def hindrance(self, part: Part, before: list[Part]) -> str:
        """Why a part will never be begun; "" if it will."""
        if part.tool and shutil.which(part.tool) is None:
            return f"not run: {part.tool} is neither on PATH nor in CUDA_HOME"
        for other in before:
            if other.ended and not other.passed:
                return f"FAILED: not run, as {other.name} did not pass"
        if self.now() > part.by * self.seconds:
            return "FAILED: no time was left"
        return ""

    def begin(self, part: Part) -> None:
        part.verdict, part.begun = "running", self.now()
        part.process = subprocess.Popen(
            part.command,
            env={**os.environ, **part.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        part.reader = threading.Thread(target=self.read, args=(part,), daemon=True)
        part.reader.start()
        self.save()

    def read(self, part: Part) -> None:
        """Each line goes into the log at once: a cut of everything leaves what was said."""
        assert part.process is not None
        assert part.process.stdout is not None
        for line in part.process.stdout:
            with self.writing:
                self.log.write(f"{part.name}| {line.rstrip()}\n")
                self.log.flush()
            if line.strip():
                part.lines = [*part.lines[-19:], line.strip()]

    def look_at(self, part: Part) -> None:
        assert part.process is not None
        assert part.reader is not None
        limit = part.by * self.seconds
        status = part.process.poll()
        if status is None and part.interrupted is None and self.now() > limit:
            part.process.send_signal(signal.SIGINT)
            part.interrupted = self.now()
        elif part.interrupted is not None and self.now() > part.interrupted + GRACE:
            self.kill(part)
        if status is None:
            return
        self.kill(part)  # what it started and left
        part.reader.join(timeout=GRACE)
        found = [line for line in part.lines if re.search(part.expects, line)]
        said = (found or part.lines or ["it said nothing"])[-1]
        if part.interrupted is not None:
            self.end(part, f"FAILED: over its time, {limit - part.begun:.0f} s: {said}")
        elif status:
            self.end(part, f"FAILED: status {status}: {said}")
        elif part.expects and not found:
            self.end(part, f"FAILED: nothing was checked: {said}")
        else:
            self.end(part, f"passed: {said}" if part.expects or part.alone else "passed")

    def kill(self, part: Part) -> None:
        assert part.process is not None
        with suppress(ProcessLookupError):
            os.killpg(part.process.pid, signal.SIGKILL)
        part.process.wait()

    def end(self, part: Part, verdict: str) -> None:
        part.seconds = self.now() - part.begun if part.process is not None else 0.0
        part.verdict = verdict
        print(row(part), flush=True)
        for line in part.lines if part.failed else ():
            print(f"    {line}", flush=True)
        self.save()

    def save(self) -> None:
        lines = [line for part in self.parts if part.name == "machine" for line in part.lines]
        machine = [line for line in lines if line.startswith("{") and line.endswith("}")]
        record = {
            "seconds": round(self.now()),
            "of": self.seconds,
            "machine": json.loads(machine[-1]) if machine else {},
            "parts": [
                {"part": p.name, "seconds": round(p.seconds), "verdict": p.verdict}
                for p in self.parts
            ],
        }
        table = [f"{'part':14} {'seconds':>8}  verdict", *map(row, self.parts)]
        for name, text in (
            ("acceptance.json", json.dumps(record, indent=1)),
            ("acceptance.txt", "\n".join(table)),
        ):
            whole = self.out / name
            whole.with_suffix(".new").write_text(text + "\n")
            whole.with_suffix(".new").replace(whole)


def row(part: Part) -> str:
    return f"{part.name:14} {part.seconds:8.0f}  {part.verdict}"


def stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu_acceptance.sh", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("parts", nargs="*", help="only these, with what they need")
    given = parser.parse_args()
    out = given.out.resolve()
    parts = all_parts(out)
    unknown = set(given.parts) - {part.name for part in parts}
    if unknown:
        names = ", ".join(part.name for part in parts)
        parser.error(f"there is no part {sorted(unknown)[0]!r}; there are {names}")
    written = os.environ.get("ACCEPTANCE_SECONDS", "540")
    if not written.isdecimal() or not int(written):
        parser.error(f"ACCEPTANCE_SECONDS={written} is not a number of seconds, such as 540")
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stop)
    # A background job ignores interrupts, and so would the parts, which are ended by them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    acceptance = Acceptance(chosen(parts, given.parts), out, float(written))
    return 0 if acceptance.run() else 1


if __name__ == "__main__":
    sys.exit(main())
