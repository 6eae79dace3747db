"""Results as data: what was measured, on what machine, in JSON and CSV, and what got slower."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import gradamp_fast
from bench.clocks import quantile
from bench.workload import cache_bytes
from gradamp_fast import _extension

SCHEMA = 1
SLOWER = 1.10  # a median that grew by less is no regression


@dataclass(frozen=True)
class Row:
    """One subject's times in one case, in microseconds.

    Attributes:
        section: "models", "elements", "tensors" or "small"; of optimizers "sgd" or "adamw".
        fraction: share of the elements amplified, as asked for; ``amplified`` is what it came to.
        subject: a backend of the package, or a baseline; of optimizers "torch", "alone",
            "amplified" or "attach + torch".
        cache: "cold" or "warm".
        clock: "wall"; on a GPU also "host", "device" and "graph".
        bytes: that the subject has to move at least; 0 where that is not one number.
    """

    section: str
    model: str
    elements: int
    tensors: int
    dtype: str
    fraction: float
    amplified: float
    timing: str
    subject: str
    leaves_out: str
    cache: str
    clock: str
    bytes: int
    runs: int
    p10: float
    median: float
    p90: float

    @property
    def key(self) -> tuple[object, ...]:
        """What the row is about, without what came of it."""
        names = ("section", "model", "elements", "tensors", "dtype", "fraction", "timing")
        return tuple(getattr(self, name) for name in (*names, "subject", "cache", "clock"))

    @property
    def label(self) -> str:
        return f"{self.model} {self.dtype} f={self.fraction:g} {self.timing}"


@dataclass(frozen=True)
class Failure:
    """A subject that was not timed, and why; ``wrong`` if its result was."""

    case: str
    subject: str
    reason: str
    wrong: bool


@dataclass(frozen=True)
class Training:
    """Whole training steps with and without amplification.

    Attributes:
        batch: in words.
        plain, amplified: milliseconds a step: p10, median, p90.
        overhead: percent of a plain step, over pairs of neighbouring steps: p10, median, p90.
        inside: milliseconds in the amplifier's call: p10, median, p90.
    """

    model: str
    batch: str
    elements: int
    pairs: int
    plain: tuple[float, float, float]
    amplified: tuple[float, float, float]
    overhead: tuple[float, float, float]
    inside: tuple[float, float, float]


@dataclass(frozen=True)
class Memory:
    """What a model's Amplifier holds, in bytes, and what its later steps allocate.

    Attributes:
        state: tensors of the state.
        workspace: everything else that was allocated up to the end of the first step.
        growth: of the process's peak over later steps, beyond what it held before them.
    """

    model: str
    dtype: str
    gradients: int
    state: int
    workspace: int
    growth: int


@dataclass
class Results:
    """All of one run."""

    machine: dict[str, Any]
    quick: bool
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    training: list[Training] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    schema: int = SCHEMA

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Writes ``<device>.json`` and, with the rows alone, ``<device>.csv``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.machine['device']}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        table = path.with_suffix(".csv")
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
        return path, table

    @staticmethod
    def load(path: Path) -> Results:
        """Raises ValueError for a file of another schema."""
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{path}: has schema {data.get('schema')}, this is schema {SCHEMA}")
        data["rows"] = [Row(**row) for row in data["rows"]]
        data["failures"] = [Failure(**failure) for failure in data["failures"]]
        data["memory"] = [Memory(**memory) for memory in data["memory"]]
        data["training"] = [_training(training) for training in data["training"]]
        return Results(**data)

    def find(self, **wanted: object) -> list[Row]:
        """Rows whose fields have these values."""
        return [r for r in self.rows if all(getattr(r, k) == v for k, v in wanted.items())]


def _training(stored: dict[str, Any]) -> Training:
    """JSON has lists where there were tuples."""
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    return Training(**given)


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """p10, median and p90."""
    return quantile(values, 0.1), quantile(values, 0.5), quantile(values, 0.9)


@dataclass(frozen=True)
class Change:
    """A row's median in two results, microseconds."""

    row: Row
    old: float
    new: float
    regression: bool

    @property
    def ratio(self) -> float:
        return self.new / self.old


def compare(old: Results, new: Results) -> list[Change]:
    """Rows that both have, worst first.

    A regression is a median more than 10 % above the old one, with a p10 above the old p90.
    """
    before = {row.key: row for row in old.rows}
    changes = []
    for row in new.rows:
        if was := before.get(row.key):
            slower = row.median > SLOWER * was.median and row.p10 > was.p90
            changes.append(Change(row, was.median, row.median, slower))
    return sorted(changes, key=lambda change: -change.ratio)


# ---- the machine --------------------------------------------------------------------


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    info: dict[str, Any] = {
        "device": device.type,
        "name": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cache": cache_bytes(device),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradamp_fast": gradamp_fast.__version__,
        "built": _extension.built_with(),
        "commit": commit(Path(__file__).parent),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if (extension := _extension.load()) is not None:
        info["instructions"] = extension.instruction_set()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "cpu": info["name"],
            "name": properties.name,
            "memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return info


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    of = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = of.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in of:
        name += f" (family {of['cpu family']}, model {of['model']})"
    return name


def _memory() -> int:
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_PHYS_PAGES" not in names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\s(\d{3}\.[\d.]+)\s", file.read_text()) if file.exists() else None
    return found[1] if found else "unknown"


def commit(folder: Path) -> str:
    """The commit checked out, with "+" if code differs from it; "unknown" outside of git."""
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    code = ("../gradamp_fast", "../csrc", "../CMakeLists.txt", "*.py")
    return head + ("+" if _git(folder, "status", "--porcelain", "--", *code) else "")


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def results_in(folder: Path) -> Sequence[Results]:
    """All results in a folder, by name: the CPU's before the GPU's."""
    return [Results.load(path) for path in sorted(folder.glob("*.json"), key=_cpu_first)]


def _cpu_first(path: Path) -> tuple[bool, str]:
    return path.stem != "cpu", path.stem
