"""Where the tests run, and what is said of where they do not."""

from __future__ import annotations

import os
import shutil
import sys
from collections import defaultdict
from typing import Any

import pytest
import torch
from cases import PLACES, Place, why_not
from cuda.emulated import compiled

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded

try:
    import hypothesis
except ImportError:  # a machine that has a GPU may have little else
    collect_ignore = ["step/test_hypothesis.py"]
else:
    hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
    hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The CUDA step, kernel and engine, compiled for the host."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    return compiled(compiler, tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def alone_too(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no amplifier takes part in is updated by the place's backend as well."""
    if "place" in request.fixturenames:
        monkeypatch.setenv("GRADAMP_BACKEND", request.getfixturevalue("place").backend)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cpu", "cuda"), help="test backends on this device only (default: all)"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Models as small as these are slower on several threads, and much slower on a busy machine.
    # Processes that tests start inherit it; what threads may change, test_determinism.py compares.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    if not running(config):
        reasons = "; ".join(f"{place}: {reason}" for place, reason in standing(config).items())
        raise pytest.UsageError(f"no backend can run: {reasons}")


def running(config: pytest.Config) -> list[Place]:
    return [place for place in PLACES if place not in standing(config)]


def standing(config: pytest.Config) -> dict[Place, str]:
    """Places that do not run, and why."""
    only = config.getoption("--device")
    asked = {p: f"--device {only}" if only not in (None, p.device) else why_not(p) for p in PLACES}
    return {place: reason for place, reason in asked.items() if reason}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``place`` runs once for every backend and device that can run."""
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", running(metafunc.config), ids=str)


def absent() -> dict[str, str]:
    """Markers whose tests cannot run here, and why."""
    out = {}
    if not torch.cuda.is_available():
        out["gpu"] = "no CUDA device"
    if os.environ.get("TRITON_INTERPRET") != "1":
        out["interpreter"] = "test_in_the_interpreter runs them under TRITON_INTERPRET=1"
    return out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if any(map(item.get_closest_marker, absent()))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not any(map(item.get_closest_marker, absent()))]
    # What takes long comes first: a worker that began it last would be waited for.
    items.sort(key=seconds, reverse=True)


def seconds(item: pytest.Item) -> float:
    """About how long a test takes; ``slow`` says it where that is minutes."""
    slow = item.get_closest_marker("slow")
    return slow.kwargs.get("seconds", 1.0) if slow else 0.0


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """What was collected away is said once for each reason."""
    names = defaultdict(list)
    for place, reason in standing(config).items():
        names[reason].append(str(place))
    for marker, reason in absent().items():
        names[reason].append(f"tests marked {marker}")
    terminalreporter.section("places")
    terminalreporter.write_line(f"run: {', '.join(map(str, running(config)))}")
    for reason, what in names.items():
        terminalreporter.write_line(f"not run: {', '.join(what)}: {reason}")
