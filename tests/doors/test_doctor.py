"""`python -m gradamp_fast doctor` and `info`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import PLACES, why_not

from gradamp_fast import Amplifier, __main__, _extension, doctor


def test_the_doctor_finds_nothing_wrong_here(capsys: pytest.CaptureFixture[str]) -> None:
    healthy = _extension.reason() is None
    assert __main__.main(["doctor"]) == (0 if healthy else 1)
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0] == "No problem found.") == healthy
    assert len(lines) <= 10 + (not healthy)
    assert f"torch {torch.__version__}" in lines[1 + (not healthy)]


def test_the_doctor_tells_all_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    healthy = _extension.reason() is None
    assert __main__.main(["doctor", "--full"]) == (0 if healthy else 1)
    printed = capsys.readouterr().out
    assert "PyTorch version" in printed
    assert f"running torch {torch.__version__}" in printed
    assert (printed.splitlines()[0] == "No problem found.") == healthy
    for place in PLACES:
        if place.device == "cuda" and not torch.cuda.is_available():
            continue
        device = "cpu" if place.device == "cpu" else f"cuda:{torch.cuda.current_device()}"
        [line] = [s for s in printed.splitlines() if f"{place.backend} on {device} " in s]
        assert ("agrees with the reference" in line) == (why_not(place) is None), line


def test_a_backend_has_one_line_for_all_devices() -> None:
    results = {
        "cuda": {"cpu": "not available: no GPU", "cuda:0": "agrees"},
        "torch": {"cpu": "agrees", "cuda:0": "agrees"},
        "cpu": {"cpu": "agrees", "cuda:0": "disagrees"},
        "triton": {"cpu": "not available: a", "cuda:0": "not available: b"},
    }
    reasons = {
        "cpu": {"cuda": "no GPU", "torch": None, "cpu": None, "triton": "a"},
        "cuda:0": {"cuda": None, "torch": None, "cpu": None, "triton": "b"},
    }
    told = facts(backends=reasons, gpus=[{"name": "A GPU", "capability": "9.0"}] * 2)
    lines = list(doctor.summary_lines({**doctor.info(), **told}, results))
    assert "  GPU: 2 x A GPU (9.0)" in lines
    assert lines[3:7] == [
        "  cuda    agrees on cuda:0",
        "  torch   agrees on cpu, cuda:0",
        "  cpu     agrees on cpu; disagrees on cuda:0",
        "  triton  not available: b",
    ]


def test_the_environment_is_collected_on_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def called() -> Any:
        raise AssertionError("this takes seconds")

    monkeypatch.setattr(doctor.collect_env, "get_env_info", called)
    assert "environment" not in doctor.info()
    assert __main__.main(["doctor"]) in (0, 1)
    assert __main__.main(["info"]) == 0


def test_a_default_device_makes_no_difference() -> None:
    expected = doctor.diagnose()
    with torch.device("meta"):
        assert doctor.diagnose() == expected


# ---- GRADAMP_BACKEND ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("cdua", "GRADAMP_BACKEND='cdua' is not one of 'auto', 'cuda', 'triton', 'cpu', 'torch' "
                 "(did you mean 'cuda'?)"),
        (" cpu", "(did you mean 'cpu'?)"),
    ],
)  # fmt: skip
def test_a_misspelt_backend_in_the_environment_is_a_problem(
    value: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADAMP_BACKEND", value)
    assert __main__.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("PROBLEM  environment variable GRADAMP_BACKEND=")
    assert problem in lines[1]
    with pytest.raises(ValueError, match="did you mean"):
        a_step()


def test_a_backend_in_the_environment_that_cannot_run_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRADAMP_BACKEND", "cuda")
    monkeypatch.setattr(doctor, "_devices", lambda: [torch.device("cpu")])
    [problem] = doctor.variable_problems()
    assert "backend 'cuda' cannot run on cpu" in problem
    assert "unset it" in problem


@pytest.mark.parametrize("value", ["", "auto", "torch"])
def test_an_empty_variable_is_unset(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADAMP_BACKEND", value)
    assert list(doctor.variable_problems()) == []
    assert a_step().report().steps == 1


def a_step() -> Amplifier:
    model = torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    amplifier = Amplifier(model)
    amplifier.step()
    return amplifier


@pytest.mark.parametrize("arguments", [["doctor"], ["info", "--json"]])
def test_a_reader_may_leave_early(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as nowhere:
        done = subprocess.run(
            [sys.executable, "-m", "gradamp_fast", *arguments],
            stdout=nowhere, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode == (0 if _extension.reason() is None or arguments[0] == "info" else 1)


# ---- a backend that fails -----------------------------------------------------------


def test_a_backend_that_errs_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = doctor._run

    def off(name: str, device: torch.device, kinds: Any) -> Any:
        written, rows = original("torch", device, kinds)
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
    def broken(name: str, device: torch.device, kinds: Any) -> Any:
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
