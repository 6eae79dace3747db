"""Which backends and devices the tests run on, and how hypothesis draws."""

from __future__ import annotations

import os

import pytest
from cases import PLACES, why_not

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded

try:
    import hypothesis
except ImportError:  # a machine that has a GPU may have little else
    collect_ignore = ["step/test_hypothesis.py"]
else:
    hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
    hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cpu", "cuda"), help="test backends on this device only (default: all)"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``place`` runs once for every backend and device."""
    if "place" not in metafunc.fixturenames:
        return
    only = metafunc.config.getoption("--device")
    params = []
    for place in PLACES:
        reason = "another device was asked for" if only not in (None, place.device) else None
        reason = reason or why_not(place)
        marks = [pytest.mark.skip(reason=f"{place}: {reason}")] if reason else []
        params.append(pytest.param(place, id=str(place), marks=marks))
    metafunc.parametrize("place", params)
