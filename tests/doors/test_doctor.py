"""`python -m gradamp_fast doctor` and `info`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import PLACES, why_not

from gradamp_fast import __main__, _extension, doctor


def test_the_doctor_finds_nothing_wrong_here(capsys: pytest.CaptureFixture[str]) -> None:
    healthy = _extension.reason() is None
    assert __main__.main(["doctor"]) == (0 if healthy else 1)
    printed = capsys.readouterr().out
    assert "PyTorch version" in printed
    assert f"running torch {torch.__version__}" in printed
    for place in PLACES:
        if place.device == "cuda" and not torch.cuda.is_available():
            continue
        device = "cpu" if place.device == "cpu" else f"cuda:{torch.cuda.current_device()}"
        [line] = [s for s in printed.splitlines() if f"{place.backend} on {device} " in s]
        assert ("agrees with the reference" in line) == (why_not(place) is None), line
    assert ("No problem found." in printed) == healthy


def test_a_backend_that_errs_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = doctor._run

    def off(name: str, device: torch.device) -> Any:
        written, rows = original("torch", device)
        if name == "torch":
            return written, rows
        return {n: t + 1 if n == "float32_1009" else t for n, t in written.items()}, rows

    monkeypatch.setattr(doctor, "_run", off)
    monkeypatch.setattr(doctor.backends, "unavailable", lambda name, device: None)
    assert __main__.main(["doctor"]) == 1
    assert (
        "PROBLEM  triton on cpu: disagrees with the reference in float32_1009"
        in capsys.readouterr().out
    )


def test_a_backend_that_raises_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, device: torch.device) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(doctor, "_run", broken)
    result, wrong = doctor._try("torch", torch.device("cpu"))
    assert wrong
    assert result == "RuntimeError: no kernel image is available"


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("8.0 9.0+PTX", "9.0", True),
        ("8.0", "8.6", True),
        ("8.6", "8.0", False),
        ("8.0", "9.0", False),
        ("8.0+PTX", "12.0", True),
        ("9.0a", "9.0", True),
        ("9.0a", "9.1", False),
        ("7.5 10.0 12.0+PTX", "9.0", False),
        ("", "9.0", False),
    ],
)
def test_which_gpus_a_binary_serves(archs: str, capability: str, runs: bool) -> None:
    assert doctor.serves(archs, capability) == runs


def facts(**changed: Any) -> dict[str, Any]:
    return {
        "extension_problem": None,
        "built_with": {"cuda": "13.0", "archs": "8.0 9.0"},
        "gpus": [{"name": "A GPU", "capability": "9.0"}],
        "backends": {"cpu": {}, "cuda:0": {"cuda": None, "triton": "no compiler"}},
        **changed,
    }


def test_what_is_wrong_with_a_build_comes_with_its_fix() -> None:
    assert list(doctor.build_problems(facts())) == []
    [problem] = doctor.build_problems(facts(extension_problem="Rebuild it: pip install"))
    assert problem == "Rebuild it: pip install"
    [problem] = doctor.build_problems(facts(built_with={"cuda": "13.0", "archs": "8.0"}))
    assert 'TORCH_CUDA_ARCH_LIST="9.0"' in problem
    neither = {"cpu": {}, "cuda:0": {"cuda": "install nvcc", "triton": "no compiler"}}
    without = facts(built_with={"cuda": "", "archs": ""}, backends=neither)
    [problem] = doctor.build_problems(without)
    assert "install nvcc" in problem
    assert "no compiler" in problem


@pytest.mark.slow
def test_info_as_json() -> None:
    output = subprocess.run(
        [sys.executable, "-m", "gradamp_fast", "info", "--json"], capture_output=True, check=True
    ).stdout
    found = json.loads(output)
    assert found["torch"] == torch.__version__
    assert found["backends"]["cpu"]["torch"] is None
    assert found["environment"]["torch_version"]


def test_info_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["info"]) == 0
    assert "torch on cpu     available" in capsys.readouterr().out
