"""FSDP2: gradients that are DTensors are amplified as the whole gradient would be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import BASE, TOLERANCE, Stream, bare, close, put, same_bits
from distributed import run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor import distribute_tensor

from gradamp_fast import Amplifier
from gradamp_fast.report import Report

if not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

QUICK: dict[str, Any] = {"min_steps": 2, "refresh": 2, "decay": 0.9}

# Cut between buckets by up to four processes, or with buckets of one element.
SHAPES: dict[str, tuple[int, ...]] = {
    "wide.weight": (512, 512),
    "wide.bias": (512,),
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


def whole_model() -> nn.Module:
    return bare(SHAPES, {name: DTYPES.get(name, torch.float32) for name in SHAPES})


def sharded_model(cut: Cut) -> nn.Module:
    model = whole_model()
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


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def numbers(amplifier: Amplifier) -> Tensor:
    """All state but the sketch."""
    return amplifier._state.values.clone()


def same_everywhere(tensor: Tensor) -> None:
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, digest)
    assert len(set(found)) == 1


class Pair:
    """The same steps with whole gradients and with sharded ones, compared after each."""

    def __init__(self, cut: Cut, backend: str, **options: Any) -> None:
        self.cut = cut
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
        for amplifier in self.amplifiers:
            amplifier.step(**{k: v.clone() for k, v in amp.items()})
        self.compare()

    def compare(self) -> None:
        expected, actual = (amplifier.report() for amplifier in self.amplifiers)
        same_report(expected, actual)
        for column in ("power", "mean_power", "noise"):
            pair = [amplifier._state.column(column) for amplifier in self.amplifiers]
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
        for field in ("name", "numel", "steps", "selected", "amplified_steps", "changed_at"):
            assert getattr(other, field) == getattr(one, field), (field, one, other)
        assert close(other.variance, one.variance, BASE.variance), (one, other)
        for field in ("fluctuation", "direction", "score"):
            pair = getattr(other, field), getattr(one, field)
            assert close(*pair, BASE.score, 1.0), (field, one, other)


# ---- checks, in four processes ------------------------------------------------------


def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    return init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))


def all_placements(rank: int) -> None:
    """Statistics, selection, written bits, norms: those of the whole gradients."""
    line, square = meshes()
    for cut in (one_mesh(line), replicas(square), mixture(line, square)):
        for backend, settings in (("cpu", SETTINGS), ("torch", SETTINGS[1:3])):
            for options in settings:
                pair = Pair(cut, backend, **options)
                for step in range(5):
                    pair.step(lacking=("middle.weight", "middle.bias") if step == 3 else ())
                selected = [row.selected for row in pair.amplifiers[1].report().layers]
                assert 0 < sum(selected) < len(selected), options


def scaled(rank: int) -> None:
    line, square = meshes()
    scale = torch.full((1,), 512.0)
    for cut in (replicas(square), mixture(line, square)):
        for unscale in (True, False):
            for options in SETTINGS[:3]:
                pair = Pair(cut, "cpu", **options)
                for step in range(4):
                    pair.step(grad_scale=scale)


CHECKS: tuple[Callable[[int], None], ...] = (all_placements, scaled)


def all_checks(rank: int) -> None:
    for check in CHECKS:
        check(rank)


def test_four_processes(tmp_path: Path) -> None:
    run(all_checks, 4, tmp_path)
