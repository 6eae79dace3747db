"""What the tests share: backends, models, gradients, the one tolerance table, the comparison."""

from __future__ import annotations

import ast
import functools
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Layer, Oracle
from torch import Tensor, nn

import gradamp_fast
from gradamp_fast import Amplifier, backends
from gradamp_fast.report import Report

REALS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)

# Where the bucket length, a tile or a 32-sign word ends, one less and one more; primes.
SIZES = (1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 1009, 4095, 4096, 4097, 8191, 8192, 8193, 10007)
LARGE_SIZES = (131071, 131072, 131073)


def torchs_optimizer_cases() -> list[Any]:
    """``optim_db``, which torch tests its own optimizers by. Skips where its parts are missing."""
    pytest.importorskip("expecttest")
    modules = pytest.importorskip("torch.testing._internal.common_optimizers")
    # Its import forbids to set flags of backends, for the rest of the process. The module that
    # has the flag is hidden behind another of its name.
    backends = torch.backends.flags_frozen.__globals__
    backends["__allow_nonbracketed_mutation_flag"] = True
    assert not torch.backends.flags_frozen()
    found: list[Any] = modules.optim_db
    return found


# ---- tolerances, against fp64 -------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """Relative errors; ``mean`` is relative to the root of the mean square."""

    written: float  # of a gradient whose multiplier comes from a norm: that and one rounding
    variance: float = 1e-5
    mean: float = 1e-6
    sketch: float = 1e-5
    score: float = 5e-5  # of max(1, |tau|); score and tau each: together the 1e-4 allowed
    bucket: float = 1e-6  # of a bucket's sum, which is rounded to fp32


TOLERANCE = {
    dtype: Tolerance(written=1e-5 + torch.finfo(dtype).eps) for dtype in (*REALS, *COMPLEX)
}
BASE = TOLERANCE[torch.float32]


def missing_libraries(code: str) -> list[str]:
    """Libraries that some code imports and that are not installed."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return sorted({name.split(".")[0] for name in names if find_spec(name.split(".")[0]) is None})


# ---- backends -----------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A backend on a kind of device."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}@{self.device}"

    def amplifier(self, model: nn.Module, **options: Any) -> Amplifier:
        return Amplifier(model, backend=self.backend, **options)


PLACES = (
    Place("torch", "cpu"),
    Place("cpu", "cpu"),
    Place("triton", "cpu"),
    Place("torch", "cuda"),
    Place("cuda", "cuda"),
    Place("triton", "cuda"),
)


@functools.cache
def why_not(place: Place) -> str | None:
    """Why the place cannot be tested here; None if it can."""
    if place.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if place == Place("triton", "cpu") and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton serves CPU tensors only under TRITON_INTERPRET=1"
    return backends.unavailable(place.backend, torch.device(place.device))


# ---- models and gradients -----------------------------------------------------------


class Bare(nn.Module):
    """Holds parameters and children, computes nothing."""


def bare(
    parameters: Mapping[str, Sequence[int]],
    dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
    device: str = "cpu",
) -> nn.Module:
    """A model with exactly these parameters, by dotted name -> shape."""
    model = Bare()
    for name, shape in parameters.items():
        *path, leaf = name.split(".")
        module: nn.Module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, Bare())
            module = module._modules[part]  # type: ignore[assignment]
        of = dtype[name] if isinstance(dtype, Mapping) else dtype
        setattr(module, leaf, nn.Parameter(torch.zeros(tuple(shape), dtype=of, device=device)))
    return model


# Six layers: a bias, a 16- and a 512-element bucket, a scalar, a size that is not a multiple of 32.
SHAPES: dict[str, tuple[int, ...]] = {
    "stem.weight": (8, 3, 3, 3),
    "stem.bias": (8,),
    "body.0.weight": (67, 65),
    "body.0.bias": (67,),
    "body.1.weight": (33,),
    "wide.weight": (363, 367),
    "scale": (),
    "head.weight": (10, 17),
    "head.bias": (10,),
}


def layers_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Layers by owning module, in the order in which ``named_modules`` reaches them."""
    grouped: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: "." in name):
        grouped.setdefault(name.rpartition(".")[0], []).append(name)
    return grouped


def normal(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Standard normal values on the CPU, drawn in fp64 and rounded once."""
    if dtype.is_complex:
        pairs = torch.randn((*shape, 2), generator=generator, dtype=torch.float64)
        return torch.view_as_complex(pairs).to(dtype)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


class Stream:
    """Gradients whose layers differ in size, in steadiness and in sign, step after step."""

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters = dict(model.named_parameters())
        self.base = {n: self.draw(p) for n, p in self.parameters.items()}
        self.step = 0

    def draw(self, parameter: nn.Parameter) -> Tensor:
        dtype = torch.complex128 if parameter.is_complex() else torch.float64
        return normal(parameter.shape, dtype, self.generator)

    def next(self) -> dict[str, Tensor]:
        out = {}
        for index, (name, parameter) in enumerate(self.parameters.items()):
            steady = (index % 4) / 3
            flip = (-1) ** self.step if index % 3 == 2 else 1
            value = flip * steady * self.base[name] + 0.5 * self.draw(parameter)
            value = value * 10.0 ** (index % 5 - 2) + 0.1 * index
            out[name] = value.to(parameter.dtype).to(parameter.device)
        self.step += 1
        return out


def put(model: nn.Module, gradients: Mapping[str, Tensor | None]) -> None:
    """Gives each parameter its gradient; one not named keeps none."""
    for name, parameter in model.named_parameters():
        parameter.grad = gradients.get(name)


def reals(tensor: Tensor) -> Tensor:
    """A view on the real elements of a tensor."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def vector(tensor: Tensor) -> np.ndarray:
    """Real elements in memory order, fp64. Dense tensors only."""
    tensor = tensor.detach()
    order = sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), d))
    return reals(tensor.permute(order).contiguous()).double().flatten().cpu().numpy()


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions from the outermost in memory to the innermost, but for those of one element."""
    longer = [dim for dim in range(tensor.dim()) if tensor.shape[dim] > 1 and tensor.numel()]
    return tuple(sorted(longer, key=lambda dim: -tensor.stride(dim)))


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that equality is equality of bits."""
    flat = reals(tensor.detach()).contiguous()
    return flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]).cpu()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def scaled(gradient: Tensor, multiplier: float) -> Tensor:
    """What torch makes of the gradient; one that is multiplied by 1 is left as it is.

    In fp16 finite numbers become no larger than the largest.
    """
    copy = gradient.clone()
    if multiplier != 1:
        reals(copy).mul_(multiplier)
    if copy.dtype == torch.float16:
        copy = torch.where(gradient.isfinite(), copy.clamp(-65504.0, 65504.0), copy)
    return copy


def flat(state: Any, path: str = "") -> dict[str, Any]:
    """Nested containers to path -> leaf."""
    if isinstance(state, dict):
        items = [(str(key), value) for key, value in state.items()]
    elif isinstance(state, (list, tuple)):
        items = [(str(index), value) for index, value in enumerate(state)]
    else:
        return {path: state}
    return {k: v for key, value in items for k, v in flat(value, f"{path}/{key}").items()}


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two state dicts hold the same bits; NaN is NaN."""
    left, right = flat(a), flat(b)
    if left.keys() != right.keys():
        return False
    for key, x in left.items():
        y = right[key]
        if isinstance(x, Tensor):
            if x.shape != y.shape or not torch.equal(x.nan_to_num(7.5), y.nan_to_num(7.5)):
                return False
        elif x != y and not (x != x and y != y):
            return False
    return True


def hash_of(model: nn.Module, amplifier: Amplifier) -> str:
    """Over every gradient and the state."""
    out = hashlib.sha256()
    for parameter in model.parameters():
        out.update(bits(parameter.grad).numpy().tobytes())
    for key, value in sorted(flat(amplifier.state_dict()).items()):
        content = value.cpu().numpy().tobytes() if isinstance(value, Tensor) else value
        out.update(f"{key}={content!r}".encode())
    return out.hexdigest()


def digest(place: Place, options: dict[str, Any], shapes: dict[str, Any]) -> str:
    """A hash over every written gradient and every state of six steps."""
    dtypes = (*REALS, *COMPLEX)
    of = {name: dtypes[index % len(dtypes)] for index, name in enumerate(shapes)}
    model = bare(shapes, of, place.device)
    amplifier = place.amplifier(model, min_steps=2, refresh=2, **options)
    stream, out = Stream(model), ""
    for _ in range(6):
        put(model, stream.next())
        amplifier.step()
        out += hash_of(model, amplifier)
    assert any(layer.selected for layer in amplifier.report().layers)
    return out


# ---- the comparison -----------------------------------------------------------------


def close(actual: float, expected: float, relative: float, scale: float | None = None) -> bool:
    """Within ``relative`` of ``scale`` (the expected value if not given); NaN and inf alike."""
    if not math.isfinite(expected):
        return actual == expected or (math.isnan(actual) and math.isnan(expected))
    return abs(actual - expected) <= relative * abs(expected if scale is None else scale)


ORACLE_ONLY = {"windows", "unit"}


class Twin:
    """An amplifier and the oracle, taking the same steps."""

    def __init__(
        self,
        model: nn.Module,
        place: Place,
        layers: Mapping[str, Sequence[str]] | None = None,
        excluded: Sequence[str] = (),
        **options: Any,
    ) -> None:
        """Options of both; ``include`` and the like go to the amplifier alone."""
        self.model = model
        if layers is None:
            layers = layers_of([n for n, _ in model.named_parameters() if n not in set(excluded)])
        plain = {k: v for k, v in options.items() if k in Oracle.__init__.__kwdefaults__}
        self.oracle = Oracle(layers, excluded, **plain)
        given = {k: v for k, v in options.items() if k not in ORACLE_ONLY}
        if "windows" in options:
            given["schedule"] = gradamp_fast.Schedule(
                options["windows"], unit=options.get("unit", "epoch")
            )
        self.amplifier = place.amplifier(model, **given)

    def set_epoch(self, epoch: int) -> None:
        self.amplifier.set_epoch(epoch)
        if self.oracle.steps:
            self.adopt_ties()
            self.oracle.set_epoch(epoch)
            self.check_report()
        else:
            self.oracle.set_epoch(epoch)

    def step(self, gradients: Mapping[str, Tensor], **amp: Any) -> None:
        """One step of both, compared; ``amp`` as ``Amplifier.step`` takes it."""
        before = {name: g.clone() for name, g in gradients.items()}
        marked = amp.get("found_inf") is not None and float(amp["found_inf"]) != 0
        put(self.model, gradients)
        self.amplifier.step(**amp)
        self.adopt_ties()
        multipliers = self.oracle.step(
            {name: vector(g) for name, g in before.items()},
            grad_scale=None if amp.get("grad_scale") is None else float(amp["grad_scale"]),
            found_inf=marked,
            unscale=amp.get("unscale", True),
            orders={name: memory_order(g) for name, g in before.items()},
        )
        if multipliers is not None:
            self.check_written(before, multipliers)
        self.check_report()

    def adopt_ties(self) -> None:
        rows = self.amplifier.report().layers
        self.oracle.ruling = {row.name: bool(row.selected) for row in rows}

    def check_written(self, before: Mapping[str, Tensor], multipliers: dict[str, float]) -> None:
        oracle = self.oracle
        measured = oracle.match_norm or oracle.max_norm is not None
        # A brake comes from variances.
        measured |= oracle.grow and any(layer.surging for layer in oracle.layers.values())
        for name, parameter in self.model.named_parameters():
            if name not in before:
                assert parameter.grad is None, name
                continue
            actual, expected = parameter.grad, scaled(before[name], multipliers[name])
            if measured:
                tolerance = TOLERANCE[actual.dtype].written
                tiny = torch.finfo(actual.dtype).smallest_normal
                torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tiny)
            else:
                assert same_bits(actual, expected), name

    def check_report(self) -> None:
        """Counters, every layer's state, tau and the selection."""
        oracle, report = self.oracle, self.amplifier.report()
        assert (report.steps, report.skipped_steps) == (oracle.steps, oracle.skipped_steps)
        assert [layer.name for layer in report.layers] == list(oracle.layers)
        lost = {name: digits_lost(layer) for name, layer in oracle.layers.items()}
        margin = BASE.score * max(1.0, abs(oracle.tau) if math.isfinite(oracle.tau) else 1.0)
        if oracle.measure == "fluctuation":
            margin = max(margin, *lost.values())
        assert close(report.threshold, oracle.tau, margin, 1.0), (report.threshold, oracle.tau)
        for row in report.layers:
            layer = oracle.layers[row.name]
            assert row.steps == layer.k, row.name
            assert close(row.variance, layer.V, BASE.variance), (row, layer.V)
            if row.numel:
                temporal = max(layer.Q - layer.R, 0.0) / row.numel
                scale = max(layer.Q, layer.R) / row.numel
                assert close(row.temporal_variance, temporal, 2 * BASE.sketch, scale), (row, layer)
            assert close(row.score, oracle.score(row.name), margin, 1.0), (row, layer)
            if layer.k >= 2:
                assert close(row.direction, layer.D, BASE.score, 1.0), (row, layer.D)
                if layer.F > 0 and layer.R > 0:
                    fluctuation = math.log(layer.F / layer.R)
                    allowed = max(BASE.score, lost[row.name])
                    assert close(row.fluctuation, fluctuation, allowed, 1.0), (row, layer)
            assert row.selected == layer.selected, (row, oracle.tau)
        if oracle.grow:
            self.check_growth(report)

    def check_growth(self, report: Report) -> None:
        oracle = self.oracle
        oracle.now = oracle.steps
        standing = oracle.factors()
        for row in report.layers:
            layer = oracle.layers[row.name]
            assert row.settled == layer.settled, (row, layer)
            assert close(row.factor, standing.get(layer.parameters[0], 1.0), BASE.variance), row


def digits_lost(layer: Layer) -> float:
    """What rounding the buckets' sums does to ln R.

    Where the running means all but cancel so do their digits: ln R is 2 (Q/R)^1/2 times as
    sensitive as the buckets that it is made of.
    """
    return 2 * BASE.bucket * math.sqrt(layer.Q / layer.R) if layer.R > 0 else 0.0
