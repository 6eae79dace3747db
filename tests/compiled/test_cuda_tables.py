"""How the CUDA backend cuts gradients into tiles, groups and launches: arithmetic on the host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TILE, GROUP, SMALL, LARGE = 4096, 32, 448, 4000

Tensors = Sequence[tuple[int, int]]  # layer (-1: excluded) and number of elements


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Tensors], dict[str, Any]]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("tables") / "tables"
    sources = [Path(__file__).parents[1] / "cuda" / "tables.cpp", CSRC / "cuda" / "tables.cpp"]
    sources.append(CSRC / "tiles.cpp")
    command = [compiler, "-std=c++17", "-O1", f"-I{CSRC}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)

    def run(layers: int, tensors: Tensors) -> dict[str, Any]:
        numbers = [str(number) for pair in tensors for number in pair]
        result = subprocess.run([program, str(layers), *numbers], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


def tiles_of(numel: int) -> int:
    return -(-numel // TILE)


def check(planned: dict[str, Any], layers: int, tensors: Tensors) -> None:
    """Every tile has one tensor and one group of its own layer, in order, without gaps."""
    tiles = [tiles_of(numel) for _, numel in tensors]
    assert planned["tensor_runs"] == [[t, n] for t, n in enumerate(tiles) if n]
    of_layer = [0] * (layers + 1)
    for (layer, _), count in zip(tensors, tiles, strict=True):
        of_layer[layer] += count  # -1, the excluded ones, is the last entry
    groups = [-(-count // GROUP) for count in of_layer]
    first_tiles = [0, *accumulate(of_layer)][:-1]
    first_groups = [0, *accumulate(groups)][:-1]
    rows = zip(first_tiles, of_layer, first_groups, groups, strict=True)
    assert planned["layers"] == [list(row) for row in rows]
    assert planned["groups"] == sum(groups)
    measured = sum(layer >= 0 for layer, _ in tensors)
    for name, capacity, count in (("small", SMALL, measured), ("large", LARGE, len(tensors))):
        chunks = planned[name]
        assert len(chunks) == max(1, -(-count // capacity))
        bounds = [[0, 0], *([c[1], c[3]] for c in chunks)]
        assert [[c[0], c[2]] for c in chunks] == bounds[:-1]
        assert bounds[-1] == [count, sum(tiles[:count])]
        assert all(c[1] - c[0] <= capacity for c in chunks)


@pytest.mark.parametrize("numel", [0, 1, TILE - 1, TILE, TILE + 1, TILE * GROUP, TILE * GROUP + 1])
def test_one_tensor(plan, numel: int) -> None:
    check(plan(1, [(0, numel)]), 1, [(0, numel)])


def test_nothing_to_measure(plan) -> None:
    """A step without tiles is counted, by one launch."""
    for layers, tensors in ((0, []), (2, [(0, 0), (1, 0)]), (0, [(-1, 5)])):
        check(plan(layers, tensors), layers, tensors)


@pytest.mark.parametrize("capacity", [SMALL, LARGE])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_about_the_capacity_of_a_table(plan, capacity: int, more: int) -> None:
    tensors = [(index // 2, 1 + index % 5) for index in range(capacity + more)]
    layers = (capacity + more + 1) // 2
    planned = plan(layers, tensors)
    check(planned, layers, tensors)
    if capacity == LARGE:
        assert len(planned["large"]) == (1 if more <= 0 else 2)


def test_layers_without_elements_and_excluded_tensors(plan) -> None:
    tensors = [(0, 0), (1, 70_000), (1, 0), (3, 1), (-1, 9_000), (-1, 0), (-1, 1)]
    check(plan(5, tensors), 5, tensors)


def test_more_elements_than_32_bits_count(plan) -> None:
    tensors = [(0, 2**31 + 1), (1, 3), (1, 3 * 2**31), (-1, 2**32 + 5)]
    check(plan(2, tensors), 2, tensors)


def test_too_many_tiles(plan) -> None:
    with pytest.raises(AssertionError, match="several Amplifiers"):
        plan(1, [(0, TILE * 2**31)])
