"""The CUDA engine against a stand-in of the runtime: what it launches, waits for and keeps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Place, Stream, bare
from cuda.emulated import EmulatedBackend

from gradamp_fast import Amplifier, backends

HERE = Place("torch", "cpu")  # what the fixture puts the emulated backend in the place of
TOO_LARGE, NOT_SUPPORTED, LAUNCH_FAILURE, OUT_OF_MEMORY, NO_IMAGE = 720, 801, 719, 2, 209
KEPT = ["arena", "values", "sketch", "parity"]


@pytest.fixture(autouse=True)
def backend(
    emulated_library: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[EmulatedBackend]]:
    class Fresh(EmulatedBackend):
        library = emulated_library

    monkeypatch.setitem(backends._BACKENDS, "torch", Fresh)
    emulated_library.runtime_answer(b"run", 0)  # launches are logged, and no more
    yield Fresh
    gc.collect()
    emulated_library.runtime_answer(b"run", 1)
    emulated_library.runtime_stream(0)
    emulated_library.runtime_end_capture()


def made(tensors: int = 5, **options: Any) -> Amplifier:
    """Of tensors of one tile each, with gradients."""
    model = bare({f"m{i}.w": (1 + i % 7,) for i in range(tensors)})
    for parameter, value in zip(model.parameters(), Stream(model).next().values(), strict=True):
        parameter.grad = value
    amplifier = HERE.amplifier(model, **options)
    amplifier.prepare()
    amplifier.model = model  # the Amplifier does not keep it alive
    return amplifier


def log_of_step(backend: type[EmulatedBackend], amplifier: Amplifier) -> list[str]:
    amplifier.step()
    return backend.log


def launches(log: list[str]) -> list[tuple[str, str, str, str]]:
    """How, which table, which phases, which tiles."""
    found = []
    for line in log:
        if "launch on" in line:
            how, _, what = line.partition(" on ")
            table, phases, _, _, tiles = what.partition(": ")[2].split(", ")
            found.append((how, table, phases, tiles))
    return found


ONE = ("launch", "large table", "phases 1")
BOTH = ("cooperative launch", "large table", "phases 3")


# ---- what is launched -----------------------------------------------------------------


@pytest.mark.parametrize("tensors", [1, 3, 4, 161, 4000])
def test_one_launch(backend: Any, tensors: int) -> None:
    for options, kind in (({}, ONE), ({"timing": "exact"}, BOTH), ({"max_norm": 1.0}, BOTH)):
        expected = (kind[0], "small table" if tensors <= 3 else kind[1], kind[2])
        log = log_of_step(backend, made(tensors, **options))
        assert launches(log) == [(*expected, f"tiles 0 to {tensors}")]


def test_more_tensors_than_a_table_holds(backend: Any) -> None:
    portions = [("large table", "tiles 0 to 4000"), ("small table", "tiles 4000 to 4001")]
    for options, phases in (({}, "1"), ({"timing": "exact"}, "12")):
        log = log_of_step(backend, made(4001, **options))
        expected = [("launch", t, f"phases {p}", tiles) for p in phases for t, tiles in portions]
        assert launches(log) == expected


def test_a_driver_that_is_too_old_for_large_tables(backend: Any) -> None:
    backend.large_table = False
    log = log_of_step(backend, made(4))
    small = ("launch", "small table", "phases 1")
    assert launches(log) == [(*small, "tiles 0 to 3"), (*small, "tiles 3 to 4")]


@pytest.mark.parametrize("cooperative", [0, 1])
def test_grids_fill_the_gpu_and_no_more(backend: Any, cooperative: int) -> None:
    backend.blocks = 0
    for name, value in ((b"processors", 3), (b"blocks", 2), (b"cooperative", cooperative)):
        backend.library.runtime_answer(name, value)
    try:
        for tensors, blocks in ((1, 1), (5, 5), (7, 6), (100, 6)):
            log = log_of_step(backend, made(tensors, timing="exact"))
            assert all(f", {blocks} blocks," in line for line in log if "launch" in line), log
            assert len(launches(log)) == 2 - cooperative
    finally:
        for name, value in ((b"processors", 2), (b"blocks", 3), (b"cooperative", 1)):
            backend.library.runtime_answer(name, value)


# ---- what fails -----------------------------------------------------------------------


@pytest.mark.parametrize("error", [TOO_LARGE, NOT_SUPPORTED])
def test_a_refused_cooperative_launch_becomes_two(backend: Any, error: int) -> None:
    amplifier = made(timing="exact")
    backend.library.runtime_fail(b"cooperative launch", error)
    two = [(*ONE, "tiles 0 to 5"), ("launch", "large table", "phases 2", "tiles 0 to 5")]
    assert launches(log_of_step(backend, amplifier)) == [(*BOTH, "tiles 0 to 5"), *two]
    assert launches(log_of_step(backend, amplifier)) == two  # it is not asked again


def test_a_failed_cooperative_launch_is_an_error_and_no_reason_to_do_without(backend: Any) -> None:
    amplifier = made(timing="exact")
    backend.library.runtime_fail(b"cooperative launch", LAUNCH_FAILURE)
    with pytest.raises(RuntimeError, match=r"launch of a step failed: .*719.*CUDA_LAUNCH_BLOCKING"):
        amplifier.step()
    assert launches(backend.log) == [(*BOTH, "tiles 0 to 5")]
    assert launches(log_of_step(backend, amplifier)) == [(*BOTH, "tiles 0 to 5")]


@pytest.mark.parametrize("error", [NOT_SUPPORTED, LAUNCH_FAILURE])
def test_nothing_that_went_through_is_repeated(backend: Any, error: int) -> None:
    """Else gradients would be multiplied twice, or a step committed twice."""
    for options, count in (({}, 4001), ({"timing": "exact"}, 5)):
        amplifier = made(count, **options)
        if count == 5:
            backend.library.runtime_fail(b"cooperative launch", NOT_SUPPORTED)
        for outcome in (0, error):
            backend.library.runtime_fail(b"launch", outcome)
        with pytest.raises(RuntimeError, match=f"launch of a step failed: .*error {error}"):
            amplifier.step()
        assert [how for how, *_ in launches(backend.log)].count("launch") == 2


def test_refused_large_tables_become_small_ones(backend: Any) -> None:
    amplifier = made(7)
    backend.library.runtime_fail(b"launch", NOT_SUPPORTED)
    small = [
        ("launch", "small table", "phases 1", f"tiles {i} to {min(i + 3, 7)}") for i in (0, 3, 6)
    ]
    assert launches(log_of_step(backend, amplifier)) == [(*ONE, "tiles 0 to 7"), *small]
    assert launches(log_of_step(backend, amplifier)) == small


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (b"load", NO_IMAGE, "loading the kernels failed: .*TORCH_CUDA_ARCH_LIST"),
        (b"copy", LAUNCH_FAILURE, "uploading the tables failed"),
        (b"synchronize", OUT_OF_MEMORY, "uploading the tables failed: .*free some memory"),
    ],
)
def test_what_fails_before_the_first_step(
    backend: Any, call: bytes, error: int, message: str
) -> None:
    before = backend.library.runtime_live_tensors()
    backend.library.runtime_fail(call, error)
    with pytest.raises(RuntimeError, match=message):
        made()
    assert backend.library.runtime_live_tensors() == before


# ---- streams and graphs ---------------------------------------------------------------


def test_streams_follow_one_another(backend: Any) -> None:
    """The event is recorded with the step: the stream may be gone when another follows."""
    amplifier, use = made(), backend.library.runtime_stream
    engine = amplifier.bound._backend
    for stream, waits in ((1, False), (1, None), (2, True), (2, None), (1, True)):
        use(stream)
        log = log_of_step(backend, amplifier)
        first_use = [] if waits is None else [f"use {name} on {stream}" for name in KEPT]
        wait = [f"wait on {stream}"] if waits else []
        assert [line for line in log if "launch" not in line] == [
            *wait, *first_use, f"record on {stream}",
        ]  # fmt: skip
        assert log[-2].startswith(f"launch on {stream}")
    assert engine.settle() == []
    use(3)
    assert engine.settle() == ["wait on 3"]


def test_steps_on_the_default_stream_need_no_event(backend: Any) -> None:
    """It cannot go, so that the event may wait until another stream has to follow."""
    amplifier = made()
    assert "record" not in " ".join(log_of_step(backend, amplifier))
    backend.library.runtime_stream(4)
    assert log_of_step(backend, amplifier)[:2] == ["record on 0", "wait on 4"]
    assert backend.log[-1] == "record on 4"


def test_a_step_follows_what_wrote_to_the_state(backend: Any) -> None:
    amplifier, library = made(), backend.library
    library.runtime_stream(1)
    amplifier.step()
    library.runtime_stream(2)
    library.runtime_log()
    amplifier.factor = 3.0
    asked = library.runtime_log().decode().splitlines()
    assert (asked[0], asked[-1]) == ("wait on 2", "record on 2")
    library.runtime_stream(1)
    assert log_of_step(backend, amplifier)[0] == "wait on 1"


def test_a_state_that_nothing_stepped_is_not_waited_for(backend: Any) -> None:
    assert made().bound._backend.settle() == []


def test_a_capture_neither_waits_nor_is_waited_for(backend: Any) -> None:
    amplifier, library = made(timing="exact"), backend.library
    amplifier.step()
    graph = library.runtime_begin_capture(9)
    library.runtime_stream(9)
    assert log_of_step(backend, amplifier) == [backend.log[0]]
    assert launches(backend.log) == [(*BOTH, "tiles 0 to 5")]
    assert amplifier.bound._backend.settle() == []
    library.runtime_end_capture()
    library.runtime_stream(0)
    assert "wait on 0" not in log_of_step(backend, amplifier)
    library.runtime_destroy_graph(graph)


def test_a_graph_keeps_the_memory_of_an_amplifier_that_is_gone(backend: Any) -> None:
    library = backend.library
    gc.collect()
    before = library.runtime_live_tensors()
    amplifier = made()
    assert library.runtime_live_tensors() == before + len(KEPT)
    graphs = []
    for _ in range(2):
        graphs.append(library.runtime_begin_capture(9))
        library.runtime_stream(9)
        for _ in range(3):
            amplifier.step()
        library.runtime_end_capture()
        library.runtime_stream(0)
    del amplifier
    gc.collect()
    for graph in graphs:
        assert library.runtime_live_tensors() == before + len(KEPT)
        library.runtime_destroy_graph(graph)
    made()  # not freed by the graph, which must not call CUDA, but at the next opportunity
    gc.collect()
    assert library.runtime_live_tensors() == before


@pytest.mark.parametrize("call", [b"user object", b"retain"])
def test_a_graph_that_cannot_keep_it_is_not_captured(backend: Any, call: bytes) -> None:
    amplifier, library = made(), backend.library
    graph = library.runtime_begin_capture(9)
    library.runtime_stream(9)
    library.runtime_fail(call, OUT_OF_MEMORY)
    with pytest.raises(RuntimeError, match="keeping memory for a graph failed"):
        amplifier.step()
    assert launches(backend.log) == []
    library.runtime_destroy_graph(graph)


def test_nothing_is_allocated_in_a_capture(backend: Any) -> None:
    graph = backend.library.runtime_begin_capture(0)
    with pytest.raises(RuntimeError, match=r"call amplifier\.prepare\(\) or make one step"):
        made()
    backend.library.runtime_destroy_graph(graph)


def test_a_gradient_without_elements_needs_no_address(backend: Any) -> None:
    model = bare({"a.w": (0,), "b.w": (5,)})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    amplifier = HERE.amplifier(model)
    amplifier.step()
    assert launches(backend.log) == [("launch", "small table", "phases 1", "tiles 0 to 1")]
