"""The machine code of the CUDA kernels, read without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from gradamp_fast import _extension, backends

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16", "float16", "float64")

# Registers a thread for the occupancy that the kernel asks for: three blocks of 256 threads
# on a processor of 65,536 registers, two on Turing.
BUDGET = {75: 128}
USUAL_BUDGET = 80


def tool(name: str) -> str:
    """One of NVIDIA's binary utilities: on PATH, or the copy inside Triton."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(bundled) if bundled.exists() else None
    if found is None:
        pytest.skip(f"{name} is neither on PATH nor inside Triton")
    return found


def output(*command: object) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def instructions(sass: str) -> list[str]:
    """What stands between the address and the semicolon, without a predicate."""
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]*?)\s*;", sass)
    return [text for text in found if text]


# ---- the extension --------------------------------------------------------------------


@functools.cache
def binary() -> Path:
    spec = importlib.util.find_spec("gradamp_fast._C")
    if spec is None or spec.origin is None or not _extension.built_with().get("cuda"):
        pytest.skip("the extension was built without CUDA kernels")
    return Path(spec.origin)


@functools.cache
def code() -> dict[int, Counter[str]]:
    """Instructions by architecture."""
    text = output(tool("cuobjdump"), "-sass", binary())
    parts = re.split(r"\barch = sm_(\d+)\w*", text)
    found: dict[int, Counter[str]] = {}
    for arch, sass in zip(parts[1::2], parts[2::2], strict=True):
        opcodes = (instruction.split()[0] for instruction in instructions(sass))
        found.setdefault(int(arch), Counter()).update(opcodes)
    return {arch: counts for arch, counts in found.items() if counts}


def test_every_architecture_has_code() -> None:
    named = _extension.built_with()["archs"].replace("+PTX", "").split()
    assert set(code()) == {int(arch.replace(".", "").rstrip("af")) for arch in named}


def test_nothing_is_spilled() -> None:
    for arch, counts in code().items():
        local = {name: n for name, n in counts.items() if name.split(".")[0] in ("LDL", "STL")}
        assert not local, (arch, local)


def test_16_bytes_are_moved_at_once() -> None:
    """Four rows a step, for each dtype: in the step that measures and that which multiplies."""
    for arch, counts in code().items():
        for kind in ("LDG", "STG"):
            wide = sum(n for name, n in counts.items() if name.startswith(f"{kind}.E.128"))
            assert wide >= 2 * 2 * 14, (arch, kind, wide)


def test_registers_are_within_the_budget() -> None:
    text = output(tool("cuobjdump"), "--dump-resource-usage", binary())
    seen = 0
    for arch, part in re.findall(r"arch = sm_(\d+)\w*(.*?)(?=arch = sm_|\Z)", text, re.DOTALL):
        for registers in re.findall(r"step_kernel.*?REG:(\d+)", part, re.DOTALL):
            assert int(registers) <= BUDGET.get(int(arch), USUAL_BUDGET), arch
            seen += 1
    assert seen == 2 * len(code())


def test_a_gpu_that_the_kernels_cannot_run_on_is_left_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    binary()
    monkeypatch.delenv("GRADAMP_BACKEND", raising=False)
    monkeypatch.setattr(_extension.load(), "cuda_unavailable", "GPU {}: too old".format)
    device = torch.device("cuda", 1)
    assert backends.choose("auto", device).name in ("triton", "torch")
    with pytest.raises(RuntimeError, match="GPU 1: too old"):
        backends.choose("cuda", device)


# ---- one dtype at a time --------------------------------------------------------------


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Instructions of each kernel of csrc/cuda/probe.cu on an H100 or H200."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    cubin = tmp_path_factory.mktemp("probe") / "probe.cubin"
    source = ROOT / "csrc" / "cuda" / "probe.cu"
    flags = ["-std=c++17", "-O3", "-arch=sm_90", "-cubin"]
    output(nvcc, *flags, "-o", cubin, source)
    text = output(tool("nvdisasm"), "-c", cubin)
    parts = re.split(r"^\.text\.(\w+):", text, flags=re.MULTILINE)
    return {name: instructions(sass) for name, sass in zip(parts[1::2], parts[2::2], strict=True)}


def double_precision(code: list[str]) -> list[str]:
    return [text for text in code if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b|\w+\.\S*F64", text)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_double_precision_for_each_element(probe: dict[str, list[str]], dtype: str) -> None:
    found = double_precision(probe[f"elements_{dtype}"])
    assert bool(found) == (dtype == "float64"), found


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tile_of_each_dtype(probe: dict[str, list[str]], dtype: str) -> None:
    code = [text.split()[0] for text in probe[f"tile_{dtype}"]]
    rows = 2 if dtype == "float64" else 4
    for kind in ("LDG.E.128", "STG.E.128"):
        assert sum(opcode.startswith(kind) for opcode in code) >= 2 * rows, kind
    assert not [opcode for opcode in code if opcode.split(".")[0] in ("LDL", "STL")]
