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
LONGEST, SMALL, LARGE = 16384, 448, 4000
GROUP_TILES, GROUPS = 128, 32  # the fewest tiles of a whole group, the most groups of a layer

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


def length(numel: int) -> int:
    limits = ((2**12, 512), (2**20, 4096), (2**23, 8192))
    return next((of for limit, of in limits if numel < limit), LONGEST)


def tiles_of(numel: int) -> int:
    return -(-numel // length(numel))


def check(planned: dict[str, Any], layers: int, tensors: Tensors) -> None:
    """Every tile has one tensor and one group of its own layer, in order, without gaps."""
    tiles = [tiles_of(numel) for _, numel in tensors]
    first_tile = [0, *accumulate(tiles)]
    assert planned["measured"] == [
        [begin if numel else -1, layer]
        for begin, (layer, numel) in zip(first_tile, tensors, strict=False)
        if layer >= 0
    ]
    of_layer = [0] * (layers + 1)
    for (layer, _), count in zip(tensors, tiles, strict=True):
        of_layer[layer] += count  # -1, the excluded ones, is the last entry
    sizes = [max(GROUP_TILES, -(-count // GROUPS)) for count in of_layer]
    groups = [-(-count // size) for count, size in zip(of_layer, sizes, strict=True)]
    assert max(groups) <= GROUPS
    first_groups = [0, *accumulate(groups)]
    assert planned["layers"] == [list(row) for row in zip(first_groups, groups, strict=False)]
    assert planned["groups"] == sum(groups)
    layer_tiles = [0, *accumulate(of_layer)]
    for number, (t, first, count, layer, group, group_begin, group_tiles) in enumerate(
        planned["tiles"]
    ):
        assert first_tile[t] <= number < first_tile[t + 1]
        numel, of = tensors[t][1], length(tensors[t][1])
        assert first == (number - first_tile[t]) * of
        assert count == min(of, numel - first)
        assert layer == tensors[t][0] % (layers + 1)
        assert group_begin <= number < group_begin + group_tiles
        in_layer = group - first_groups[layer]
        assert group_begin == layer_tiles[layer] + in_layer * sizes[layer]
        assert group_tiles == min(sizes[layer], layer_tiles[layer + 1] - group_begin)
    measured = sum(layer >= 0 for layer, _ in tensors)
    for name, capacity, count in (("small", SMALL, measured), ("large", LARGE, len(tensors))):
        chunks = planned[name]
        assert len(chunks) == max(1, -(-count // capacity))
        bounds = [[0, 0], *([c[1], c[3]] for c in chunks)]
        assert [[c[0], c[2]] for c in chunks] == bounds[:-1]
        assert bounds[-1] == [count, sum(tiles[:count])]
        assert all(c[1] - c[0] <= capacity for c in chunks)


BOUNDS = (
    1,
    512,
    2**12,
    4096 * GROUP_TILES,
    2**20,
    2**23,
    LONGEST * GROUP_TILES,
    LONGEST * GROUP_TILES * GROUPS,
)


@pytest.mark.parametrize("numel", [0, *(bound + i for bound in BOUNDS for i in (-1, 0, 1))])
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
        plan(1, [(0, LONGEST * 2**31)])
