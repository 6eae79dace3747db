"""FSDP2: gradients that are DTensors are amplified as the whole gradient would be."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import BASE, TOLERANCE, Stream, bare, close, put, same_bits
from distributed import run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

import gradamp_fast
from gradamp_fast import Amplifier, Schedule
from gradamp_fast.backends.triton import TritonBackend
from gradamp_fast.reference.state import GLOBAL_FIELDS
from gradamp_fast.report import Report

if not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

QUICK: dict[str, Any] = {"min_steps": 2, "refresh": 2, "decay": 0.9}

# Cut between buckets by up to four processes, or with buckets of one element.
SHAPES: dict[str, tuple[int, ...]] = {
    "wide.weight": (384, 384),
    "wide.bias": (384,),
    "middle.weight": (64, 96),
    "middle.bias": (64,),
    "head.weight": (10, 17),
    "head.bias": (10,),
    "tiny.weight": (1, 7),
    "scale": (),
}
DTYPES = {
    "middle.weight": torch.bfloat16,
    "head.bias": torch.float64,
    "tiny.weight": torch.complex64,
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"timing": "exact", "measure": "direction", "select": "above"},
    {"match_norm": True, "threshold": "std", "num_std": 0.5, "group_by": "tensor"},
    {"max_norm": 0.5, "timing": "exact", "measure": "variance", "exclude": ["head.*", "wide.bias"]},
    {"threshold": "quantile", "decay": None, "max_norm": 3.0, "exclude_bias_and_norm": True},
]
GROWING: list[dict[str, Any]] = [
    {"grow": True, "refresh": 1},
    {"grow": True, "refresh": 1, "max_norm": 3.0, "exclude": ["wide.bias"], "timing": "exact"},
]

Cut = Mapping[str, tuple[DeviceMesh, list[Placement]] | None]


def one_mesh(mesh: DeviceMesh) -> Cut:
    return {name: (mesh, [Shard(0)]) if shape else None for name, shape in SHAPES.items()}


def replicas(mesh: DeviceMesh) -> Cut:
    """HSDP: groups of processes that hold the same parts."""
    cut: list[Placement] = [Replicate(), Shard(0)]
    return {name: (mesh, cut) if shape else None for name, shape in SHAPES.items()}


def mixture(line: DeviceMesh, square: DeviceMesh) -> Cut:
    """Several meshes and placements, also within one layer, and plain tensors."""
    return {
        "wide.weight": (square, [Shard(0), Shard(0)]),
        "wide.bias": None,
        "middle.weight": (line, [Shard(0)]),
        "middle.bias": (square, [Replicate(), Shard(0)]),
        "head.weight": (square, [Shard(0), Shard(1)]),
        "head.bias": (line, [Replicate()]),
        "tiny.weight": (square, [Shard(0), Replicate()]),
        "scale": None,
    }


def whole_model(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> nn.Module:
    return bare(shapes, {name: DTYPES.get(name, torch.float32) for name in shapes})


def sharded_model(cut: Cut, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> nn.Module:
    model = whole_model(shapes)
    for name, where in cut.items():
        if where is not None:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            part = distribute_tensor(getattr(module, leaf).data, *where)
            setattr(module, leaf, nn.Parameter(part))
    return model


def spread(cut: Cut, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    out: dict[str, Tensor | None] = {}
    for name, gradient in gradients.items():
        where = cut[name]
        copy = None if gradient is None else gradient.clone()
        out[name] = copy if copy is None or where is None else distribute_tensor(copy, *where)
    return out


def draw(stream: Stream) -> dict[str, Tensor | None]:
    """The next gradients; the stream's model is sharded."""
    return dict(stream.next())


def here(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def numbers(amplifier: Amplifier) -> Tensor:
    """All state but the sketch."""
    return amplifier.bound.settled_state().values.clone()


def same_everywhere(tensor: Tensor) -> None:
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, digest)
    assert len(set(found)) == 1


class Pair:
    """The same steps with whole gradients and with sharded ones, compared after each."""

    def __init__(self, cut: Cut, backend: str, unscale: bool = True, **options: Any) -> None:
        self.cut, self.unscale = cut, unscale
        self.models = whole_model(), sharded_model(cut)
        given = {**QUICK, "backend": backend, **options}
        self.amplifiers = [Amplifier(model, **given) for model in self.models]
        self.stream = Stream(self.models[0])
        self.from_norm = "match_norm" in options or "max_norm" in options

    def step(self, lacking: tuple[str, ...] = (), **amp: Any) -> None:
        gradients: dict[str, Tensor | None] = dict(self.stream.next())
        for name in lacking:
            gradients[name] = None
        put(self.models[1], spread(self.cut, gradients))
        put(self.models[0], gradients)
        before = self.places()
        for amplifier in self.amplifiers:
            amplifier.step(**amp, unscale=self.unscale)
        after = self.places()
        assert after.keys() == before.keys()
        for name, (address, version) in before.items():
            assert after[name][0] == address, "a gradient has moved"
            if self.cut[name] is not None:
                assert after[name][1] > version
        self.compare()

    def places(self) -> dict[str, tuple[int, int]]:
        """Where every gradient lies here, and its version."""
        return {
            name: (here(p.grad).data_ptr(), p.grad._version)
            for name, p in self.models[1].named_parameters()
            if p.grad is not None
        }

    def compare(self) -> None:
        expected, actual = (amplifier.report() for amplifier in self.amplifiers)
        same_report(expected, actual)
        for column in ("power", "mean_power", "noise"):
            pair = [amplifier.bound.settled_state().column(column) for amplifier in self.amplifiers]
            torch.testing.assert_close(pair[1], pair[0], rtol=2 * BASE.sketch, atol=0)
        same_everywhere(numbers(self.amplifiers[1]))
        for (name, p), q in zip(
            self.models[0].named_parameters(), self.models[1].parameters(), strict=True
        ):
            if p.grad is None:
                assert q.grad is None
                continue
            found = whole(q.grad)
            if self.from_norm:
                tolerance = TOLERANCE[p.dtype].written
                torch.testing.assert_close(found, p.grad, rtol=tolerance, atol=0)
            else:
                assert same_bits(found, p.grad), name
        norms = [amplifier.total_norm for amplifier in self.amplifiers]
        if norms[0] is not None:
            torch.testing.assert_close(norms[1], norms[0], rtol=BASE.variance, atol=0)


def same_report(expected: Report, actual: Report) -> None:
    assert (actual.steps, actual.skipped_steps) == (expected.steps, expected.skipped_steps)
    assert close(actual.threshold, expected.threshold, BASE.score, 1.0)
    for one, other in zip(expected.layers, actual.layers, strict=True):
        for field in (
            "name",
            "numel",
            "steps",
            "selected",
            "settled",
            "amplified_steps",
            "changed_at",
        ):
            assert getattr(other, field) == getattr(one, field), (field, one, other)
        for field in ("variance", "factor"):
            pair = getattr(other, field), getattr(one, field)
            assert close(*pair, BASE.variance), (field, one, other)
        for field in ("fluctuation", "direction", "score"):
            pair = getattr(other, field), getattr(one, field)
            assert close(*pair, BASE.score, 1.0), (field, one, other)


# ---- checks, in four processes ------------------------------------------------------


def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    return init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))


def all_placements(rank: int) -> None:
    """Statistics, selection, written bits, norms: those of the whole gradients."""
    line, square = meshes()
    runs = (
        ("cpu", one_mesh(line), [*SETTINGS[:2], {"measure": "random", "threshold": 0.5}]),
        ("cpu", replicas(square), SETTINGS[1:4]),
        ("cpu", mixture(line, square), SETTINGS),
        ("torch", mixture(line, square), SETTINGS[2:3]),
    )
    for backend, cut, settings in runs:
        for options in settings:
            pair = Pair(cut, backend, **options)
            for step in range(4):
                pair.step(lacking=("middle.weight", "middle.bias") if step == 3 else ())
            selected = [row.selected for row in pair.amplifiers[1].report().layers]
            assert 0 < sum(selected) < len(selected), options


class Agreeing(Stream):
    """Gradients that agree from step to step, but for the head's."""

    def next(self) -> dict[str, Tensor]:
        return {
            name: ((not name.startswith("head")) * base + 0.3 * self.draw(p)).to(p.dtype)
            for (name, p), base in zip(self.parameters.items(), self.base.values(), strict=True)
        }


def growing(rank: int) -> None:
    """The whole model is asked, and layers grow and settle alike in all processes."""
    line, square = meshes()
    for options in GROWING:
        pair = Pair(mixture(line, square), "cpu", **options)
        pair.stream = Agreeing(pair.models[0])
        for _ in range(5):
            pair.step()
        layers = {row.name: row for row in pair.amplifiers[1].report().layers}
        assert layers["wide"].factor > 2.0
        assert layers["head"].settled


def half_of_the_processes(rank: int) -> None:
    """Two models, each on a mesh of its own, as the stages of a pipeline are."""
    whole_mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("stage", "copy", "shard"))
    for mesh in (whole_mesh["copy", "shard"], whole_mesh["shard"]):
        where: list[Placement] = [Replicate(), Shard(0)][-mesh.ndim :]
        pair = Pair({n: (mesh, where) if s else None for n, s in SHAPES.items()}, "cpu")
        for _ in range(3):
            pair.step()
        assert pair.amplifiers[1].bound._backend.group.size() == 2


def scaled(rank: int) -> None:
    """Gradients that are measured, and written or not, without the loss scale."""
    line, square = meshes()
    for options in SETTINGS[:3]:
        for unscale in (True, False):
            cut = replicas(square) if unscale else mixture(line, square)
            pair = Pair(cut, "cpu", unscale=unscale, **options)
            for _ in range(3):
                pair.step(grad_scale=torch.full((1,), 512.0))


def nonfinite(rank: int) -> None:
    """What one process alone finds stops the step in all of them."""
    line, square = meshes()
    for cut in (one_mesh(line), replicas(square), mixture(line, square)):
        nonfinite_in(rank, cut, "wide.weight", {})
        nonfinite_in(rank, cut, "wide.bias", {"timing": "exact"})
        nonfinite_in(rank, cut, "middle.weight", {"max_norm": 1.0})


def nonfinite_in(rank: int, cut: Cut, name: str, options: dict[str, Any]) -> None:
    model = sharded_model(cut)
    amplifier, stream = Amplifier(model, **QUICK, **options), Stream(model)
    for step in range(5):
        put(model, spread(cut, dict(draw(stream).items())))
        if step == 2 and rank == 2:
            here(model.get_parameter(name).grad).view(-1)[-1] = torch.nan
        found_inf = torch.zeros(1) if step % 2 == 0 else None
        if step == 4 and rank == 1:
            found_inf = torch.ones(1)
        untouched = {n: here(p.grad).clone() for n, p in model.named_parameters()}
        before = amplifier.bound.settled_state().values.clone()
        amplifier.step(found_inf=found_inf)
        if found_inf is not None:
            assert amplifier.bound._backend._pending is None
            assert found_inf.item() == (step in (2, 4))
        report = amplifier.report()
        assert (report.steps, report.skipped_steps) == (step + 1, (0, 0, 1, 1, 2)[step])
        same_everywhere(numbers(amplifier))
        if step in (2, 4):
            after = amplifier.bound.settled_state().values.clone()
            for index, field in enumerate(GLOBAL_FIELDS):
                if field in ("step", "skipped_steps", "round_skipped", "total_norm"):
                    before[index] = after[index] = 0.0
            assert torch.equal(after.nan_to_num(), before.nan_to_num())
            norm = amplifier.total_norm
            assert norm is None or norm.isnan()
        if step in (2, 4) and (options or (step, rank) == (4, 1)):
            for n, p in model.named_parameters():
                assert same_bits(here(p.grad), untouched[n])
    with pytest.raises(RuntimeError, match=f"layer.s. '{name.partition('.')[0]}'"):
        stop_all(rank, cut, name)


def stop_all(rank: int, cut: Cut, name: str) -> None:
    model = sharded_model(cut)
    amplifier = Amplifier(model, error_if_nonfinite=True, **QUICK)
    put(model, spread(cut, draw(Stream(model))))
    amplifier.step()
    if rank == 2:
        here(model.get_parameter(name).grad).view(-1)[-1] = torch.inf
    amplifier.step()


def asynchronous(rank: int) -> None:
    """One all-reduce a step, waited for when the next step or a reader needs it."""
    line, square = meshes()
    cut = mixture(line, square)
    model = sharded_model(cut)
    amplifier, stream = Amplifier(model, schedule=Schedule([(0, 9)]), **QUICK), Stream(model)
    amplifier.set_epoch(0)
    counter = amplifier.bound._state.scalar("step")
    readers: list[Callable[[], Any]] = [
        amplifier.report, amplifier.summary, amplifier.state_dict, amplifier.record,
        lambda: amplifier.set_epoch(1), lambda: amplifier.factor,
        lambda: setattr(amplifier, "factor", 3.0),
    ]  # fmt: skip

    def step() -> None:
        put(model, spread(cut, draw(stream)))
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            amplifier.step()
        assert [call.kwargs["async_op"] for call in all_reduce.call_args_list] == [True]

    for count, reader in enumerate(readers):
        step()
        assert counter == count
        reader()
        assert counter == count + 1, count
    step()
    amplifier.rebind()  # waits whether it finds something new or not, as in all processes
    assert counter == len(readers) + 1
    step()
    assert counter == len(readers) + 1
    amplifier.reset()
    assert counter == 0
    amplifier.set_epoch(0)
    step()
    assert amplifier.report().steps == 1


def resumed(rank: int) -> None:
    """A snapshot goes on where it stood, on other meshes and without any as well."""
    line, square = meshes()
    halves: Cut = {n: (square, [Shard(0), Replicate()]) if s else None for n, s in SHAPES.items()}
    cuts: list[Cut] = [one_mesh(line), mixture(line, square), halves, dict.fromkeys(SHAPES)]
    for cut in cuts:
        first = sharded_model(cut)
        amplifier, stream = Amplifier(first, **QUICK), Stream(first)
        gradients = [draw(stream) for _ in range(7)]
        advance(first, amplifier, cut, gradients[:4])
        state = amplifier.state_dict()
        advance(first, amplifier, cut, gradients[4:])
        for other in cuts:
            second = sharded_model(other)
            again = Amplifier(second, **QUICK)
            if other is not cut and cuts[1] in (other, cut):  # by another dimension
                with pytest.raises(ValueError, match=r"parameter 'head.weight' was cut"):
                    again.load_state_dict(state)
                assert again.report().steps == 0
                continue
            again.load_state_dict(state)
            advance(second, again, other, gradients[4:])
            same_report(amplifier.report(), again.report())
            for p, q in zip(first.parameters(), second.parameters(), strict=True):
                assert same_bits(whole(p.grad), whole(q.grad))
            if other is cut:
                same = numbers(again).nan_to_num(), numbers(amplifier).nan_to_num()
                assert torch.equal(*same)


def not_seamless(rank: int) -> None:
    """Cut within buckets: resumes as it was cut, and no other way."""
    line, square = meshes()
    cuts: list[Cut] = [
        {"odd.weight": (line, [Shard(0)])},
        {"odd.weight": (square, [Shard(0), Replicate()])},
        {"odd.weight": None},
    ]
    shapes = {"odd.weight": (10, 500)}
    for cut in cuts:
        model = sharded_model(cut, shapes)
        amplifier, stream = Amplifier(model, **QUICK), Stream(model)
        advance(model, amplifier, cut, [draw(stream) for _ in range(3)])
        state = amplifier.state_dict()
        for other in cuts:
            again = Amplifier(sharded_model(other, shapes), **QUICK)
            if other is cut:
                again.load_state_dict(state)
                assert repr(again.report()) == repr(amplifier.report())
            else:
                with pytest.raises(ValueError, match=r"'odd.weight' was cut .* multiples of 32 "):
                    again.load_state_dict(state)


def stored_by_dcp(rank: int, folder: str) -> None:
    """torch.distributed.checkpoint takes an Amplifier for what it is."""
    line, square = meshes()
    for number, cut in enumerate((one_mesh(line), mixture(line, square), dict.fromkeys(SHAPES))):
        model = sharded_model(cut)
        amplifier, stream = Amplifier(model, **QUICK), Stream(model)
        gradients = [draw(stream) for _ in range(6)]
        advance(model, amplifier, cut, gradients[:3])
        path = f"{folder}/stored.{number}"
        dcp.save({"amplifier": amplifier}, checkpoint_id=path)
        advance(model, amplifier, cut, gradients[3:])
        second = sharded_model(cut)
        again = Amplifier(second, **QUICK)
        dcp.load({"amplifier": again}, checkpoint_id=path)
        advance(second, again, cut, gradients[3:])
        assert torch.equal(numbers(again).nan_to_num(), numbers(amplifier).nan_to_num())
        for p, q in zip(model.parameters(), second.parameters(), strict=True):
            assert same_bits(here(p.grad), here(q.grad))


def advance(
    model: nn.Module, amplifier: Amplifier, cut: Cut, gradients: list[dict[str, Tensor | None]]
) -> None:
    for step in gradients:
        put(model, spread(cut, step))
        amplifier.step()


CHECKS: tuple[Callable[..., None], ...] = (
    all_placements, growing, half_of_the_processes, scaled, nonfinite, asynchronous, resumed,
    not_seamless, stored_by_dcp,
)  # fmt: skip


def all_checks(rank: int, folder: str) -> list[str]:
    times = []
    for check in CHECKS:
        begin = time.perf_counter()
        check(rank, *([folder] if check is stored_by_dcp else []))
        times.append(f"{check.__name__} {time.perf_counter() - begin:.1f} s")
    return times


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    times, *_ = run(all_checks, 4, tmp_path, str(tmp_path))
    print(*times, sep="\n")  # pytest -s shows them


# ---- fully_shard, in two processes --------------------------------------------------


class Network(nn.Module):
    """Linear layers in a stack; the last is not a unit of sharding of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stack:
            x = layer(x).relu()
        return self.head(self.norm(x))


def networks() -> tuple[Network, Network]:
    """The same twice: whole, and sharded over all processes but for the norm."""
    torch.manual_seed(0)
    alone, sharded = Network(), Network()
    sharded.load_state_dict(alone.state_dict())
    for layer in sharded.stack:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    ignored = set(sharded.norm.parameters())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)), ignored_params=ignored)
    return alone, sharded


def trained(rank: int) -> None:
    """Alike in every step, with clipping too; an epoch that begins after an evaluation."""
    for options in ({}, {"timing": "exact", "max_norm": 0.1}):
        models = networks()
        schedule = Schedule([(0, 9)])
        amplifiers = [Amplifier(m, schedule=schedule, **QUICK, **options) for m in models]
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
        for amplifier, optimizer in zip(amplifiers, optimizers, strict=True):
            amplifier.attach(optimizer)
        generator = torch.Generator().manual_seed(1)
        for step in range(8):
            batch = torch.randn(8, 64, generator=generator)
            if step % 4 == 0:
                for model, amplifier in zip(models, amplifiers, strict=True):
                    with torch.no_grad():
                        model(batch)  # leaves the root's parameters whole
                    amplifier.set_epoch(step // 4)
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
        expected, actual = (amplifier.report() for amplifier in amplifiers)
        assert actual.steps == 8
        assert any(row.selected for row in actual.layers)
        for one, other in zip(expected.layers, actual.layers, strict=True):
            assert (one.name, one.numel, one.selected, one.steps) == (
                other.name, other.numel, other.selected, other.steps,
            )  # fmt: skip
        same_everywhere(numbers(amplifiers[1]))
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(whole(q.detach()), p.detach(), rtol=1e-4, atol=1e-6)


def refused(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))

    def fails(error: type[Exception], message: str, parameter: Tensor, gradient: Tensor) -> None:
        model = bare({"layer.w": (4, 4), "other.w": (3,)})
        model.layer.w = nn.Parameter(parameter)
        model.layer.w.grad = gradient
        with pytest.raises(error, match=message):
            Amplifier(model).step()

    w = torch.ones(4, 4)
    sharded = distribute_tensor(w, mesh, [Shard(0)])
    partial = DTensor.from_local(w, mesh, [Partial()])
    copies = DTensor.from_local(w, mesh, [Replicate()])
    fails(TypeError, "gradient of 'layer.w' has placements .* still to be summed", copies, partial)
    fails(TypeError, "parameter 'layer.w' has placements .* still to be summed", partial, partial)
    fails(TypeError, "'layer.w' has placements .*, the parameter .*redistribute", sharded, copies)
    fails(TypeError, "'layer.w' is a plain tensor, the parameter a DTensor", sharded, w)
    fails(TypeError, "'layer.w' is a DTensor, the parameter a plain tensor", w, sharded)

    here: dict[str, Any] = {"device_id": torch.device("cpu")}
    with pytest.raises(TypeError, match=r"'_flat_param' .*fully_shard .FSDP2. instead"):
        Amplifier(FullyShardedDataParallel(Network(), **here))
    with pytest.raises(TypeError, match=r"'stack.0.weight' .*fully_shard .FSDP2. instead"):
        Amplifier(FullyShardedDataParallel(Network(), use_orig_params=True, **here))

    _, network = networks()
    network(torch.randn(4, 64)).sum().backward()
    with pytest.raises(ValueError, match=r"backward.* does not serve sharded gradients"):
        gradamp_fast.fused_amplify(network, placement="backward")
    assert gradamp_fast.fused_amplify(network).report().steps == 1
    gradamp_fast.reset(network)
    amplifier = Amplifier(network, backend="triton")
    with pytest.raises(RuntimeError, match="triton"):
        amplifier.step()
    with (
        mock.patch.object(TritonBackend, "unavailable", return_value=None),
        pytest.raises(RuntimeError, match="sharded gradients; cuda, cpu, torch can"),
    ):
        amplifier.step()


def first_fsdp(rank: int) -> None:
    """FullyShardedDataParallel that shards nothing is like DDP."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is on its way out
        model = FullyShardedDataParallel(
            Network(),
            device_id=torch.device("cpu"),
            sharding_strategy=ShardingStrategy.NO_SHARD,
            use_orig_params=True,
        )
    amplifier = Amplifier(model, **QUICK)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(4):
        model.zero_grad()
        model(torch.randn(4, 64, generator=generator)).square().mean().backward()
        amplifier.step()
    same_everywhere(numbers(amplifier))
    again = Amplifier(Network(), **QUICK)
    again.load_state_dict(amplifier.state_dict())
    assert repr(again.report()) == repr(amplifier.report())


def two_checks(rank: int) -> None:
    trained(rank)
    refused(rank)
    first_fsdp(rank)


def test_two_processes(tmp_path: Path) -> None:
    run(two_checks, 2, tmp_path)
