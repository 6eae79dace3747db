"""What only the CUDA C++ backend promises, on a GPU: launches, grids, order, addresses."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from cases import (
    COMPLEX,
    REALS,
    SHAPES,
    Place,
    Stream,
    Twin,
    bare,
    hash_of,
    put,
    same_bits,
    why_not,
)
from torch import Tensor, nn

from gradamp_fast import Amplifier, Schedule

HERE = Place("cuda", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_not(HERE) is not None, reason=f"{HERE}: {why_not(HERE)}"),
]

QUICK: dict[str, Any] = {"min_steps": 1, "refresh": 2, "decay": 0.9}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"timing": "exact", "measure": "direction", "select": "above"},
    {"match_norm": True},
    {"max_norm": 0.5, "timing": "exact", "measure": "variance"},
    {"measure": "random", "seed": 2**32 - 1, "threshold": "quantile"},
    {"threshold": "quantile", "decay": None, "group_by": "tensor", "max_norm": 3.0},
]
MIXED = {**SHAPES, "empty": (0,), "tail.weight": (9, 455), "large.weight": (1201, 1009)}


def mixed(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    every = (*REALS, *COMPLEX)
    return bare(shapes, {n: every[i % len(every)] for i, n in enumerate(shapes)}, HERE.device)


def stress(amplifier: Amplifier, **what: Any) -> None:
    """What a step must not depend on: ``Stress`` in csrc/engine.h."""
    amplifier.bound._backend.compiled.stress(**what)


@functools.cache
def gradients_of(steps: int) -> list[dict[str, Tensor]]:
    stream = Stream(mixed(MIXED))
    return [stream.next() for _ in range(steps)]


def disturb(random: Random) -> None:
    """Other streams' kernels take processors for a while: blocks begin late, in another order."""
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.rand(random.randrange(1, 1 << 22), device="cuda").sort()


def history(
    options: dict[str, Any], steps: int = 5, beside: int | None = None, **what: Any
) -> list[str]:
    """Hashes after each of some steps, under stress; ``beside``: seed of what disturbs them."""
    random = Random(beside)
    model = mixed(MIXED)
    amplifier = HERE.amplifier(model, **{**QUICK, **options})
    found = []
    for step, gradients in enumerate(gradients_of(5)[:steps]):
        put(model, {name: gradient.clone() for name, gradient in gradients.items()})
        if step == 0:
            amplifier.prepare()
            stress(amplifier, **what)
        if beside is not None:
            disturb(random)
        amplifier.step()
        found.append(hash_of(model, amplifier))
    return found


def device_events(run: Callable[[], object]) -> list[str]:
    """Names of everything that ran on the device."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == cuda]


# ---- launches -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"timing": "exact"}, {"max_norm": 1.0}], ids=str)
@pytest.mark.parametrize("tensors", [161, 1000, 4000, 4001])
def test_launches(tensors: int, options: dict[str, Any]) -> None:
    """One for up to 4,000 tensors of any dtypes, and no copy and no memset beside it."""
    model = bare(
        {f"m{i}.w": (1 + i % 700,) for i in range(tensors)},
        {f"m{i}.w": REALS[i % len(REALS)] for i in range(tensors)},
        HERE.device,
    )
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    amplifier = HERE.amplifier(model, **QUICK, **options)
    for _ in range(3):
        amplifier.step()
    events = device_events(amplifier.step)
    launches = 1 if tensors <= 4000 else 2 if not options else 4
    assert len(events) == launches, events
    assert all("step_kernel" in name for name in events), events


def test_a_step_without_elements_is_counted() -> None:
    model = bare({"a": (0,), "b.w": (0, 3)}, device=HERE.device)
    put(model, {n: torch.zeros_like(p) for n, p in model.named_parameters()})
    amplifier = HERE.amplifier(model)
    for _ in range(2):
        amplifier.step()
    assert amplifier.report().steps == 2


# ---- values ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [*REALS, "mixed"], ids=str)
def test_against_the_oracle(options: dict[str, Any], dtype: Any) -> None:
    model = mixed(MIXED) if dtype == "mixed" else bare(MIXED, dtype, HERE.device)
    each = {name: [name] for name, _ in model.named_parameters()}
    layers = each if "group_by" in options else None
    twin = Twin(model, HERE, layers, **{**QUICK, **options})
    stream = Stream(model)
    for _ in range(6):
        twin.step(stream.next())


@pytest.mark.parametrize("options", SETTINGS[:4], ids=str)
@pytest.mark.parametrize("unscale", [True, False])
def test_scaled_and_skipped(options: dict[str, Any], unscale: bool) -> None:
    model = bare(SHAPES, {n: REALS[i % 4] for i, n in enumerate(SHAPES)}, HERE.device)
    excluded = ("head.bias", "stem.weight")
    twin = Twin(model, HERE, None, excluded, exclude=excluded, **{**QUICK, **options})
    stream = Stream(model)
    scale, found_inf = torch.full((1,), 512.0, device="cuda"), torch.zeros(1, device="cuda")
    for step in range(6):
        gradients = stream.next()
        if step == 2:
            gradients["wide.weight"][200, 100] = torch.inf
        found_inf.fill_(step == 3)
        twin.step(gradients, grad_scale=scale, found_inf=found_inf, unscale=unscale)
        assert found_inf.item() == (step in (2, 3))


def test_more_than_two_to_the_31_elements() -> None:
    """In one tensor, against torch on the same values; every index beyond 32 bits counts."""
    count = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("less than 14 GiB of GPU memory are free")
    model = bare({"small.weight": (33,)}, torch.bfloat16, HERE.device)
    zero = torch.zeros((), dtype=torch.bfloat16, device="cuda")
    model.register_parameter("large", nn.Parameter(zero.expand(count)))
    gradient = torch.empty(count, dtype=torch.bfloat16, device="cuda")
    gradient.normal_(generator=torch.Generator("cuda").manual_seed(0))
    gradient[2**31 :] += 64.0  # the variance misses its tolerance without them
    put(model, {"large": gradient, "small.weight": torch.ones_like(model.small.weight)})
    amplifier = HERE.amplifier(
        model,
        measure="variance",
        select="above",
        threshold=-1e9,
        min_steps=1,
        refresh=1,
        factor=3.0,
    )
    pieces = gradient.split(2**28)
    mean = sum(part.sum(dtype=torch.float64) for part in pieces) / count
    squares = sum((part.double() - mean).square_().sum() for part in pieces)
    amplifier.step()
    variance = next(row.variance for row in amplifier.report().layers if row.numel == count)
    assert variance == pytest.approx(float(squares / count), rel=1e-5)
    before = gradient.clone()
    amplifier.step()
    assert torch.equal(gradient.view(torch.int16), before.mul_(3.0).view(torch.int16))


# ---- what a step must not depend on ---------------------------------------------------


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_grid_order_and_old_memory_change_no_bit(options: dict[str, Any]) -> None:
    """Grids, one launch or two, other streams' kernels, NaN in the workspace."""
    expected = history(options)
    for what in (
        {"blocks": 1},
        {"blocks": 7, "beside": 1},
        {"cooperative": False},
        {"cooperative": False, "blocks": 33, "poison": True},
        {"beside": 2, "poison": True},
    ):
        assert history(options, **what) == expected, what


@pytest.mark.parametrize("options", SETTINGS[:4], ids=str)
def test_repeats_with_three_grids(options: dict[str, Any]) -> None:
    """Thirty times beside other kernels, each time the same bits after two steps."""
    found = set()
    for repeat in range(30):
        blocks = (0, 3, 50)[repeat % 3]
        found.add(history(options, steps=2, blocks=blocks, beside=repeat)[-1])
    assert len(found) == 1


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}], ids=str)
def test_alignment_changes_no_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Gradients at every offset from 16 bytes; nothing around them is touched."""
    sizes = {"a.w": (4608,), "b.w": (1,), "c.w": (3000,), "d.w": (140_001,), "e.w": (4099,)}
    reference, size = None, torch.empty((), dtype=dtype).element_size()
    for offset in range(16 // size):
        model = bare(sizes, dtype, HERE.device)
        amplifier = HERE.amplifier(
            model,
            measure="variance",
            min_steps=1,
            refresh=1,
            select="above",
            threshold=-1e9,
            **options,
        )
        stream, memory = Stream(model), []
        for _ in range(2):
            memory.clear()
            for parameter, value in zip(model.parameters(), stream.next().values(), strict=True):
                whole = torch.full((value.numel() + 32,), 7.0, dtype=dtype, device="cuda")
                parameter.grad = whole[offset : offset + value.numel()].copy_(value)
                memory.append(whole)
            amplifier.step()
        for whole, parameter in zip(memory, model.parameters(), strict=True):
            assert (whole[:offset] == 7).all()
            assert (whole[offset + parameter.numel() :] == 7).all()
        assert any(row.amplified_steps for row in amplifier.report().layers)
        gradients = [p.grad.clone() for p in model.parameters()]
        reference = reference or gradients
        assert all(same_bits(a, b) for a, b in zip(reference, gradients, strict=True))


# ---- graphs and streams ---------------------------------------------------------------


@pytest.mark.parametrize("options", SETTINGS[:4], ids=str)
def test_replay_equals_eager(options: dict[str, Any]) -> None:
    """With mixed dtypes and a scale that changes, while the schedule opens and closes."""
    schedule = Schedule([(2, 4), (6, 8, 0.5)], unit="step")
    runs = []
    for graphed in (False, True):
        model = mixed(MIXED)
        amplifier = HERE.amplifier(model, schedule=schedule, **{**QUICK, **options})
        stream, scale = Stream(model), torch.ones(1, device="cuda")
        put(model, stream.next())
        amplifier.prepare()
        run: Callable[[], object] = lambda a=amplifier, s=scale: a.step(grad_scale=s)  # noqa: E731
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            run = graph.replay
        found = []
        for step in range(10):
            for parameter, value in zip(model.parameters(), stream.next().values(), strict=True):
                parameter.grad.copy_(value)
            scale.fill_(2.0 ** (step % 3))
            run()
            found.append(hash_of(model, amplifier))
        runs.append(found)
    assert runs[0] == runs[1]


def test_nothing_is_allocated_in_a_capture() -> None:
    """A step that would have to raises, and says what to do before."""
    model = bare(SHAPES, device=HERE.device)
    put(model, Stream(model).next())
    amplifier = HERE.amplifier(model)
    with pytest.raises(RuntimeError, match="prepare"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        amplifier.step()
    torch.cuda.synchronize()


def test_a_graph_outlives_its_amplifier() -> None:
    """The memory that its steps use is not given to others."""
    shapes = {"a.w": (5000,), "b.w": (70,)}
    graph, found = torch.cuda.CUDAGraph(), []
    for graphed in (False, True):
        model = bare(shapes, device=HERE.device)
        stream = Stream(model)
        put(model, stream.next())
        amplifier = HERE.amplifier(model, timing="exact", **QUICK)
        amplifier.step()
        if graphed:
            with torch.cuda.graph(graph):
                amplifier.step()
        for step in range(4):
            for parameter, value in zip(model.parameters(), stream.next().values(), strict=True):
                parameter.grad.copy_(value)
            if not graphed:
                amplifier.step()
                continue
            if step == 1:
                del amplifier
                gc.collect()
                torch.cuda.synchronize()
                others = [torch.full((1 << 10,), torch.nan, device="cuda") for _ in range(2000)]
            graph.replay()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
    assert all(bool(other.isnan().all()) for other in others)


def test_whoever_reads_the_state_waits_for_a_step_on_another_stream() -> None:
    model = bare({"a.w": (1 << 20,)}, device=HERE.device)
    put(model, Stream(model).next())
    amplifier = HERE.amplifier(model, **QUICK)
    amplifier.prepare()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        amplifier.step()
    assert amplifier.report().steps == 1


def test_streams_follow_one_another() -> None:
    """Without any waiting by the caller, though each stream is kept busy before."""
    model = bare({"a.w": (1 << 20,), "b.w": (4000,)}, device=HERE.device)
    put(model, Stream(model).next())
    amplifier = HERE.amplifier(model, **QUICK)
    amplifier.prepare()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    for step in range(12):
        with torch.cuda.stream(streams[step % 3]):
            torch.cuda._sleep((step % 4) * 200_000)
            amplifier.step()
    torch.cuda.synchronize()
    again = bare({"a.w": (1 << 20,), "b.w": (4000,)}, device=HERE.device)
    put(again, Stream(again).next())
    expected = HERE.amplifier(again, **QUICK)
    for _ in range(12):
        expected.step()
    assert hash_of(model, amplifier) == hash_of(again, expected)
