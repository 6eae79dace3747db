"""The machine code of the CUDA kernels, read without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gradamp_fast import _extension, backends

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16", "float16", "float64")

# Registers a thread for the occupancy that the kernel asks for: three blocks of 256 threads
# on a processor of 65,536 registers on Hopper, two elsewhere.
HOPPERS_BUDGET, BUDGET = 80, 128


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
def code() -> dict[int, dict[str, Counter[str]]]:
    """Instructions of each kernel, by architecture."""
    text = output(tool("cuobjdump"), "-sass", binary())
    parts = re.split(r"\barch = sm_(\d+)\w*", text)
    found: dict[int, dict[str, Counter[str]]] = {}
    for arch, sass in zip(parts[1::2], parts[2::2], strict=True):
        named = re.split(r"Function : (\S+)", sass)
        for name, body in zip(named[1::2], named[2::2], strict=True):
            opcodes = (instruction.split()[0] for instruction in instructions(body))
            found.setdefault(int(arch), {})[name] = Counter(opcodes)
    return found


def count(counts: Counter[str], *beginnings: str) -> int:
    return sum(n for name, n in counts.items() if name.startswith(beginnings))


# For a launch of few tensors and for one of many; the last two, by SGD's rule and by Adam's.
KERNELS = {"step_kernel": 2, "update_kernel": 4, "apply_kernel": 4}


def kernels(kind: str) -> Iterator[tuple[int, Counter[str]]]:
    """Of every architecture, those of one kind."""
    for arch, named in code().items():
        found = [counts for name, counts in named.items() if kind in name]
        assert len(found) == KERNELS[kind], (arch, list(named))
        yield from ((arch, counts) for counts in found)


def test_every_architecture_has_code() -> None:
    named = _extension.built_with()["archs"].replace("+PTX", "").split()
    assert set(code()) == {int(arch.replace(".", "").rstrip("af")) for arch in named}


@pytest.mark.parametrize("kind", KERNELS)
def test_nothing_is_spilled(kind: str) -> None:
    """But for eight bytes by Adam on sm_120, stored at three places and loaded at nine."""
    for arch, counts in kernels(kind):
        spilled = count(counts, "STL"), count(counts, "LDL")
        assert spilled == (0, 0) or ((kind, arch), spilled) == (("update_kernel", 120), (3, 9)), (
            arch, spilled
        )  # fmt: skip


def test_16_bytes_are_moved_at_once() -> None:
    """A step is eight rows: straight into shared memory from sm_80 on. Written are four rows of
    each dtype at once in the first phase, and of two 16-bit ones at any address."""
    for arch, counts in kernels("step_kernel"):
        assert count(counts, "LDGSTS.E.BYPASS.128" if arch >= 80 else "LDG.E.128") >= 8, arch
        assert count(counts, "STG.E.128") >= 4 * 6, arch


@pytest.mark.parametrize(("kind", "most"), [("step_kernel", 3), ("update_kernel", 3),
                                            ("apply_kernel", 1)])  # fmt: skip
def test_only_the_last_acquires(kind: str, most: int) -> None:
    """The last of a group and of the grid, and the barrier between the phases; where nothing is
    measured the last of the grid alone.

    An acquire drops what the processor holds in L1, so those that come earlier only release.
    """
    for arch, counts in kernels(kind):
        assert 0 < count(counts, "CCTL.IVALL") <= most, arch


def test_registers_are_within_the_budget() -> None:
    text = output(tool("cuobjdump"), "--dump-resource-usage", binary())
    seen = 0
    for arch, part in re.findall(r"arch = sm_(\d+)\w*(.*?)(?=arch = sm_|\Z)", text, re.DOTALL):
        for kind, registers in re.findall(r"(\w+_kernel)I.*?REG:(\d+)", part, re.DOTALL):
            hoppers = arch == "90" and "step_kernel" in kind
            assert int(registers) <= (HOPPERS_BUDGET if hoppers else BUDGET), (arch, kind)
            seen += 1
    assert seen == sum(KERNELS.values()) * len(code())


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
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The machine code of each kernel of csrc/cuda/probe.cu on an H100 or H200."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    cubin = tmp_path_factory.mktemp("probe") / "probe.cubin"
    source = ROOT / "csrc" / "cuda" / "probe.cu"
    flags = ["-std=c++17", "-O3", "-arch=sm_90", "-cubin"]
    output(nvcc, *flags, "-o", cubin, source)
    text = output(tool("nvdisasm"), "-c", cubin)
    parts = re.split(r"^\.text\.(\w+):", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def double_precision(code: list[str]) -> list[str]:
    return [text for text in code if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b|\w+\.\S*F64", text)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_double_precision_for_each_element(probe: dict[str, str], dtype: str) -> None:
    found = double_precision(instructions(probe[f"elements_{dtype}"]))
    assert bool(found) == (dtype == "float64"), found


# Instructions of half a step, four rows of 32 vectors, as they stand in the loop: what an H200
# runs of them, for buckets of 512, is 147 for fp32 and 284 for bf16, measured with ncu. Of those
# fp32 needs 6 an element and bf16 7: x - shift, its sum, its square's, the sign (2), the
# signed sum, and unpacking. At 4.3 TB/s its schedulers have room for about 450, for every dtype.
# The rest of a loop is for buckets of 16, which tensors of fewer than 131,072 elements have. In
# fp16 products saturate, in 5 instructions for two.
BUDGET_OF_HALF_A_STEP = {
    "read_float32": 230, "read_bfloat16": 380, "read_float16": 380, "read_float64": 255,
    "write_float32": 285, "write_bfloat16": 470, "write_float16": 550, "write_float64": 285,
}  # fmt: skip


def loops(sass: str) -> Iterator[list[str]]:
    """The instructions of each loop."""
    text: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(text)
        text += instructions(line)
        back = re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", line)
        if back and back[1] in labels:
            yield text[labels[back[1]] :]


@pytest.mark.parametrize("name", BUDGET_OF_HALF_A_STEP)
def test_half_a_step_is_within_the_budget(probe: dict[str, str], name: str) -> None:
    found = [
        loop for loop in loops(probe[name]) if sum(text.startswith("LDS.128") for text in loop) >= 4
    ]
    inner = min(found, key=len)
    assert len(inner) <= BUDGET_OF_HALF_A_STEP[name]
    stores = sum(text.startswith("STG.E.128") for text in inner)
    assert stores == (4 if name.startswith("write") else 0)


@pytest.mark.parametrize("name", BUDGET_OF_HALF_A_STEP)
def test_a_tile_of_each_dtype(probe: dict[str, str], name: str) -> None:
    opcodes = [text.split()[0] for text in instructions(probe[name])]
    assert sum(opcode.startswith("LDGSTS.E.BYPASS.128") for opcode in opcodes) >= 8
    assert not [opcode for opcode in opcodes if opcode.split(".")[0] in ("LDL", "STL")]
