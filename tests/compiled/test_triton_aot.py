"""The Triton kernel compiled ahead of time, without a GPU: vector widths, registers, spills."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradamp_fast.backends.triton import columns, launch
from gradamp_fast.backends.triton.step import step_kernel

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = (1 << code for code in range(4))
SGD, ADAM, AMSGRAD = columns.SGD.value, columns.ADAM.value, columns.AMSGRAD.value
TYPES = {
    "*fp64": "values config tile_rows group_rows layer_rows scores verdict",
    "*fp32": "sketch",
    "*i32": "parity tile_tensor layer_tiles tickets",
    "*i64": "tensors addresses",
    "i64": "grad_scale found_inf buckets",
    "i32": "measured layers measured_tiles tiles unscale begins_round decides phases slots",
    "constexpr": "DTYPES BY_BITS GROWS UPDATE",
}
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names.split()}
FULL_BLOCK_LOADS = {FLOAT32: 8, BFLOAT16: 4, FLOAT16: 4, FLOAT64: 8}  # 16 bytes for each lane
MOST_REGISTERS = 65536 // (16 * 32)
BODIES = 3  # measured, multiplied in the first phase, multiplied in the second


def compiled(
    target: GPUTarget,
    dtypes: int,
    cooperative: bool = False,
    grows: bool = False,
    update: int = 0,
) -> Any:
    signature = {name: TYPE_OF[name] for name in step_kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(step_kernel.arg_names)
        if TYPE_OF[name].startswith("*")
    }
    constants = {"DTYPES": dtypes, "BY_BITS": False, "GROWS": grows, "UPDATE": update}
    source = ASTSource(step_kernel, signature, constants, aligned)
    options = launch.compiler_options(cooperative, target.backend == "hip")
    return triton.compile(source, target=target, options=options)


def innermost_loops(sass: list[str]) -> list[list[str]]:
    """The instructions of each loop that has none within."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in sass:
        if label := re.match(r"\.?(LBB\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif ";" in line:
            target = re.search(r"BRA.*?(LBB\d+)", line)
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(instructions)))
            instructions.append(line)
    inner = [
        (first, last)
        for first, last in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]
    return [instructions[first : last + 1] for first, last in inner]


def only_used_by(ptx: str, operation: str, user: str) -> int:
    """How many results of an operation go into nothing but the user."""
    results, users = set[str](), dict[str, set[str]]()
    for line in ptx.splitlines():
        if parts := re.match(r"\s*(?:@\S+ )?(\S+)\s+(\S+?), (.*);", line):
            if parts[1] == operation:
                results.add(parts[2])
            for source in re.findall(r"%\w+", parts[3]):
                users.setdefault(source, set()).add(parts[1])
    return sum(users.get(result) == {user} for result in results)


def spills(lines: list[str]) -> int:
    return sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtypes", "in_loop", "in_all"),
    [
        (80, FLOAT16, 0, 64),
        (90, FLOAT32 | BFLOAT16, 0, 64),
        # Triton has ptxas for Blackwell allocate registers in another way, which spills more.
        (100, BFLOAT16, 96, 640),
    ],
)
def test_widths_registers_and_spills(arch: int, dtypes: int, in_loop: int, in_all: int) -> None:
    kernel = compiled(GPUTarget("cuda", arch, 32), dtypes)
    vectors = BODIES * sum(n for dtype, n in FULL_BLOCK_LOADS.items() if dtype & dtypes)
    ptx = kernel.asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == vectors
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == vectors
    assert re.search(r"ld\.global\.b(16|32)\b", ptx), "no path for misaligned gradients"
    assert not re.search(r"\.ftz\.f32", ptx), "subnormal numbers would be lost"

    assert f".maxnreg {MOST_REGISTERS}" in ptx
    sass = kernel.asm["sass"].splitlines()
    first_load = next(i for i, line in enumerate(sass) if "LDG.E.128" in line)
    first_store = next(i for i, line in enumerate(sass) if "STG.E.128" in line)
    assert spills(sass[first_load:first_store]) <= in_loop
    assert spills(sass) <= in_all


@pytest.mark.slow
def test_fp64_and_a_grid_that_waits() -> None:
    """fp64 takes no more registers than the rest: one such tensor would have all programs wait."""
    kernel = compiled(GPUTarget("cuda", 90, 32), FLOAT64, cooperative=True)
    assert kernel.metadata.launch_cooperative_grid
    wide = re.findall(r"ld\.global\.(?:v2\.b64|v4\.b32)", kernel.asm["ptx"])
    assert len(wide) == BODIES * FULL_BLOCK_LOADS[FLOAT64]
    assert f".maxnreg {MOST_REGISTERS}" in kernel.asm["ptx"]
    assert spills(kernel.asm["sass"].splitlines()) <= 32


@pytest.mark.slow
def test_growth_spills_next_to_nothing() -> None:
    kernel = compiled(GPUTarget("cuda", 90, 32), FLOAT32 | BFLOAT16, grows=True)
    assert spills(kernel.asm["sass"].splitlines()) <= 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtypes", "rule", "in_all"),
    [
        (80, FLOAT16, ADAM, 192),
        (90, FLOAT32 | BFLOAT16, SGD, 128),
        (90, FLOAT32 | BFLOAT16, ADAM, 384),
        (90, FLOAT32, AMSGRAD, 256),
    ],
)
def test_updates(arch: int, dtypes: int, rule: int, in_all: int) -> None:
    """16-byte accesses to every tensor, registers that suffice, and products that are rounded."""
    kernel = compiled(GPUTarget("cuda", arch, 32), dtypes, update=rule)
    ptx, sass = kernel.asm["ptx"], kernel.asm["sass"].splitlines()
    run, tensors = (256, 4) if rule == AMSGRAD else (512, rule + 1)
    loads = stores = products = 0
    for dtype, measured in FULL_BLOCK_LOADS.items():
        if dtype & dtypes:
            vectors = measured * run // 1024
            loads += measured + BODIES * vectors * (tensors + 1)
            stores += BODIES * vectors * tensors
            products += 2 * BODIES * run // 32  # runs that are whole, and those that are not
    assert len(re.findall(r"ld\.global\.(?:cg\.)?v4\.b32", ptx)) == loads
    assert len(re.findall(r"ld\.global\.cg\.v4\.b32", ptx)) == stores
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == stores
    assert only_used_by(ptx, "mul.f32", "xor.b32") == products
    # The exponential of fp64 looks at its upper half as at an fp32 number; that is no arithmetic.
    assert not re.search(r"(add|sub|mul|fma|div|sqrt)\S*\.ftz\.f32|sqrt\.approx|div\.full", ptx)
    assert f".maxnreg {MOST_REGISTERS}" in ptx
    runs = [loop for loop in innermost_loops(sass) if any("STG.E.128" in line for line in loop)]
    assert len(runs) == BODIES * bin(dtypes).count("1")
    assert [spills(loop) for loop in runs] == [0] * len(runs)
    assert spills(sass) <= in_all


@pytest.mark.slow
def test_amd() -> None:
    """The source compiles for AMD as it is."""
    compiled(GPUTarget("hip", "gfx942", 64), BFLOAT16, update=ADAM)
    kernel = compiled(GPUTarget("hip", "gfx942", 64), FLOAT32)
    assert len(re.findall(r"global_load_dwordx4", kernel.asm["amdgcn"])) > 0


def test_parameters_are_all_described() -> None:
    assert set(step_kernel.arg_names) == set(TYPE_OF)
