"""The Triton backend in triton's interpreter, on small models, against the oracle.

The interpreter has to be chosen before triton is imported: the tests run in a process of their
own. On a GPU the whole suite runs on this backend beside the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import COMPLEX, REALS, Place, Stream, Twin, bare, bits, put, same_bits

from gradamp_fast import Amplifier, backends, reference
from gradamp_fast.call import Call
from gradamp_fast.model.walk import find_layers
from gradamp_fast.options import Options
from gradamp_fast.reference.state import State

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.interpreter
outside = pytest.mark.skipif(INTERPRETED, reason="says what happens without the interpreter")

PLACE = Place("triton", "cpu")
QUICK: dict[str, Any] = {"min_steps": 2, "refresh": 2, "decay": 0.9}
# A block and one more, runs of 16, less than a vector, no element, more than a tile.
SHAPES = {"a.w": (41, 103), "a.b": (3,), "b.w": (1025,), "c.w": (33,), "d.w": (0,), "d.b": ()}
DTYPES = dict(zip(SHAPES, (*REALS, *COMPLEX), strict=True))


def version(module: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@outside
@pytest.mark.slow(seconds=200)
@pytest.mark.parametrize("name", ["test_triton_update.py", "test_triton.py"])
def test_in_the_interpreter(name: str) -> None:
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    if version(triton) < (3, 8) and version(numpy) >= (2, 4):
        pytest.skip("the interpreter of this triton needs numpy < 2.4")
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            str(Path(__file__).with_name(name)),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@outside
def test_says_why_it_cannot_run() -> None:
    model = torch.nn.Linear(2, 2)
    model(torch.ones(2)).sum().backward()
    with pytest.raises(RuntimeError, match=r"triton.*TRITON_INTERPRET=1"):
        Amplifier(model, backend="triton").step()
    assert "not mps" in str(backends.unavailable("triton", torch.device("mps")))


@inside
def test_the_interpreter_serves_the_cpu_alone() -> None:
    assert backends.unavailable("triton", torch.device("cpu")) is None
    assert "unset" in str(backends.unavailable("triton", torch.device("cuda")))


# ---- whole steps ------------------------------------------------------------------------


def run_twin(options: dict[str, Any], steps: int, **model: Any) -> Twin:
    twin = Twin(bare(**({"parameters": SHAPES, "dtype": DTYPES} | model)), PLACE, **options)
    stream = Stream(twin.model)
    for _ in range(steps):
        twin.step(stream.next())
    return twin


@inside
@pytest.mark.parametrize(
    "options",
    [
        {"factor": 1 / 3},
        {"timing": "exact", "measure": "direction", "threshold": "quantile"},
        {"measure": "variance", "decay": None, "select": "above", "group_by": "tensor"},
        {"windows": [(1, 3, 0.7), (3, 9)], "unit": "step", "threshold": "std", "num_std": 0.2},
        {
            "grow": True,
            "factor": 1.5,
            "measure": "direction",
            "threshold": 0.0,
            "decay": 0.5,
            "refresh": 1,
        },
        {
            "grow": True,
            "factor": 1.5,
            "measure": "direction",
            "threshold": -0.3,
            "timing": "exact",
            "refresh": 1,
        },
    ],
    ids=str,
)
def test_mixed_dtypes(options: dict[str, Any]) -> None:
    if options.get("group_by") == "tensor":
        options = options | {"group_by": lambda name: name}
        model = bare(SHAPES, DTYPES)
        twin = Twin(model, PLACE, layers={n: [n] for n in SHAPES}, **(QUICK | options))
        stream = Stream(model)
        for _ in range(4):
            twin.step(stream.next())
    else:
        twin = run_twin(QUICK | options, 4)
    assert any(layer.selected for layer in twin.amplifier.report().layers)


@inside
def test_runs_of_512_over_many_tiles() -> None:
    run_twin(QUICK, 3, parameters={"a.w": (131, 1009), "b.w": (5000,)}, dtype=torch.bfloat16)


@inside
@pytest.mark.parametrize("options", [{"match_norm": True}, {"max_norm": 0.5, "timing": "exact"}])
def test_norms(options: dict[str, Any]) -> None:
    model = bare(SHAPES, DTYPES)
    layers = {name: [p for p in SHAPES if p[0] == name] for name in "abd"}
    twin = Twin(model, PLACE, layers=layers, excluded=["c.w"], exclude="c.w", **QUICK, **options)
    stream = Stream(model)
    for _ in range(4):
        twin.step(stream.next())


@inside
@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("timing", ["lagged", "exact"])
def test_grad_scale_and_skipped_steps(timing: str, unscale: bool) -> None:
    model = bare(SHAPES, DTYPES)
    layers = {name: [p for p in SHAPES if p[0] == name] for name in "abd"}
    twin = Twin(
        model, PLACE, layers=layers, excluded=["c.w"], exclude="c.w", timing=timing, **QUICK
    )
    stream, scale = Stream(model), torch.tensor([128.0])
    for step in range(6):
        found_inf, gradients = torch.zeros(()), stream.next()
        if step == 2:
            found_inf.fill_(1)
        if step == 3:
            gradients["b.w"].view(-1)[1024] = float("nan")
        version = found_inf._version
        twin.step(gradients, grad_scale=scale, found_inf=found_inf, unscale=unscale)
        assert found_inf.item() == (step in (2, 3))
        assert found_inf._version > version
    assert twin.amplifier.report().skipped_steps == 2


@inside
def test_gradients_anywhere_in_memory() -> None:
    """Misaligned, transposed and strided gradients; each is written, its version counted."""
    shapes = {"a.w": (3000,), "b.w": (50, 60), "c.w": (40, 3)}
    straight = run_twin({"factor": 3.0} | QUICK, 3, parameters=shapes, dtype=torch.float32)
    model = bare(shapes)
    amplifier = PLACE.amplifier(model, factor=3.0, **QUICK)
    stream = Stream(model)
    for _ in range(3):
        a, b, c = stream.next().values()
        model.a.w.grad = torch.cat((torch.zeros(1), a))[1:]
        model.b.w.grad = b
        model.c.w.grad = torch.cat((c, c), dim=1)[:, :3]
        versions = [p.grad._version for p in model.parameters()]
        amplifier.step()
        assert all(p.grad._version > v for p, v in zip(model.parameters(), versions, strict=True))
    assert amplifier.report().layers == straight.amplifier.report().layers
    assert any(layer.selected for layer in amplifier.report().layers)
    for p, q in zip(model.parameters(), straight.model.parameters(), strict=True):
        assert same_bits(p.grad, q.grad)


@inside
@pytest.mark.parametrize("magnitude", [1e-25, 1e18, 3e38])
def test_squares_outside_the_range_of_fp32(magnitude: float) -> None:
    model = bare({"a.w": (1500,)})
    amplifier = PLACE.amplifier(model)
    draw = torch.rand(1500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradient = ((2 * draw - 0.5) * magnitude / 1.5).float()
    put(model, {"a.w": gradient})
    amplifier.step()
    variance = gradient.double().var(correction=0)
    assert abs(amplifier.report().layers[0].variance / variance - 1) < 1e-5


@inside
def test_bf16_is_rounded_to_nearest_even() -> None:
    """Numbers of every exponent, infinities and NaN, as ``mul_`` rounds them."""
    words = torch.arange(0, 65536, 61, dtype=torch.int32).to(torch.int16)
    gradient = words.view(torch.bfloat16)
    model = bare({"a.w": (gradient.numel(),)}, torch.bfloat16)
    amplifier = PLACE.amplifier(model)
    amplifier.prepare()
    amplifier.bound.settled_state().column("selected").fill_(1.0)
    for factor in (2.0, 1 / 3, 1.0000001e-3):
        amplifier.factor = factor
        put(model, {"a.w": gradient.clone()})
        amplifier.step()  # skipped, for it holds NaN; written all the same
        expected = gradient.clone().mul_(factor)
        number = ~expected.isnan()
        assert same_bits(model.a.w.grad[number], expected[number])
        assert model.a.w.grad[~number].isnan().all()


# ---- determinism, and a state that any backend continues ---------------------------------


def outcome(programs: int) -> bytes:
    model = bare({"a.w": (9000,), "b.w": (4100,), "c.w": (5,)})
    amplifier = PLACE.amplifier(model, timing="exact", match_norm=True, **QUICK)
    stream, out = Stream(model), b""
    for _ in range(2):
        put(model, stream.next())
        amplifier.prepare()
        launches = amplifier.bound._backend.launcher._launch
        from gradamp_fast.backends.triton.step import step_kernel

        launches.update(dict.fromkeys(launches, step_kernel[(programs,)]))
        amplifier.step()
        out += b"".join(bits(p.grad).numpy().tobytes() for p in model.parameters())
    return (
        out
        + amplifier.bound.settled_state().values.numpy().tobytes()
        + amplifier.bound.settled_state().sketch.numpy().tobytes()
    )


@inside
def test_the_grid_changes_no_bit() -> None:
    assert len({outcome(programs) for programs in (1, 3, 40)}) == 1


@inside
def test_torch_continues_what_triton_began() -> None:
    ends = []
    for switch in (False, True):
        model = bare(SHAPES)
        amplifier, stream = PLACE.amplifier(model, **QUICK), Stream(model)
        for step in range(4):
            if switch and step == 2:
                stored = amplifier.state_dict()
                del amplifier
                amplifier = Amplifier(model, backend="torch", **QUICK)
                amplifier.load_state_dict(stored)
            put(model, stream.next())
            amplifier.step()
        ends.append([(r.selected, r.steps, r.score) for r in amplifier.report().layers])
    for mine, other in zip(*ends, strict=True):
        assert mine[:2] == other[:2]
        assert mine[2] == pytest.approx(other[2], rel=1e-6, abs=1e-6, nan_ok=True)


# ---- decisions --------------------------------------------------------------------------

RULES: list[dict[str, Any]] = [
    {"threshold": "mean"},
    {"threshold": "std", "num_std": 0.5, "select": "above"},
    {"threshold": "quantile", "quantile": 0.5},
    {"threshold": "quantile", "quantile": 0.123, "measure": "direction"},
    {"threshold": "quantile", "quantile": 0.99, "measure": "variance", "select": "above"},
    {"threshold": -0.1},
    {"threshold": "quantile", "quantile": 0.3, "measure": "random", "seed": 2**32 - 1},
    {"grow": True, "factor": 1.3, "max_factor": 1.1},
]


@inside
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("layers", [1, 2, 64, 150])
def test_decisions_are_those_of_the_definition(rule: dict[str, Any], layers: int) -> None:
    """Over random states with ties, ineligible layers and scores that are not finite."""
    from interpreted import decide_kernel

    from gradamp_fast.backends.triton import columns
    from gradamp_fast.backends.triton.launch import configuration

    options = Options.make(rule | {"min_steps": 3})
    plan = find_layers(bare({f"m{i}.w": (1,) for i in range(layers)}), options)
    generator = torch.Generator().manual_seed(layers)
    for eligible in (0.0, 0.7, 1.0):
        expected, actual = (State(plan, 2.0, torch.device("cpu")) for _ in range(2))
        rows = torch.rand(expected.layers.shape, generator=generator, dtype=torch.float64) + 0.1
        rows = rows.mul(8).round().div(8)  # ties
        rows[:, columns.STEPS.value] = (
            torch.rand(layers, generator=generator).lt(eligible).double().mul(4)
        )
        rows[layers // 2, columns.MEAN_POWER.value] = 0.0  # a score of infinity
        rows[:, columns.SELECTED.value] = torch.rand(layers, generator=generator).lt(0.5).double()
        rows[:, columns.AGREEMENT.value] -= 0.25
        rows[:, columns.SETTLED.value] = torch.rand(layers, generator=generator).lt(0.3).double()
        rows[:, columns.LEAST_VARIANCE.value] /= 4
        rows[:, columns.ON_UPDATE.value] = torch.rand(layers, generator=generator).lt(0.3).double()
        for state in (expected, actual):
            state.scalar("gated").fill_(eligible > 0.5)
            state.layers.copy_(rows)
            state.scalar("step").fill_(17.0)
        rules = options.rules()
        factor = reference.active_factor(expected, rules, Call())
        reference.decide(expected, rules, torch.tensor(5.0), torch.tensor(17.0), factor)
        numbers = torch.tensor(configuration(rules), dtype=torch.float64)
        decide_kernel[(1,)](
            actual.values,
            numbers,
            torch.zeros(layers, dtype=torch.float64),
            layers,
            5,
            17.0,
            rules.grow,
        )
        tau, other = expected.scalar("threshold"), actual.scalar("threshold")
        assert torch.allclose(tau, other, rtol=1e-12, atol=1e-12, equal_nan=True)
        assert torch.equal(expected.layers, actual.layers)
