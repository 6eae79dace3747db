"""Real training loops: accumulation, averages of weights, two players, sweeps, notebooks."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from cases import Place, same_bits
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import gradamp_fast
from gradamp_fast import Amplifier

QUICK = {"min_steps": 2, "refresh": 2, "decay": 0.9}
ALL = {"measure": "variance", "min_steps": 1, "refresh": 1, "threshold": 1e9}


def network(device: str = "cpu", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)]
    return nn.Sequential(*layers).to(device)


def batch(number: int, device: str = "cpu") -> Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(number)).to(device)


def backward(model: nn.Module, number: int, share: float = 1.0) -> None:
    x = batch(number, next(model.parameters()).device.type)
    (share * (model(x) - x[:, :4].sin()).square().mean()).backward()


def train(model: nn.Module, amplifier: Amplifier, steps: Any, **options: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **options)
    for number in steps:
        optimizer.zero_grad()
        backward(model, number)
        amplifier.step()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def steps(amplifier: Amplifier) -> list[int]:
    return [row.steps for row in amplifier.report().layers]


@pytest.fixture(autouse=True)
def without_warnings() -> Any:
    """What is right says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- accumulation ---------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_is_one_call_an_update(place: Place, set_to_none: bool) -> None:
    """It measures the sum, and multiplies it once."""
    model = network(place.device)
    amplifier = place.amplifier(model, **ALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for update in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        for micro in range(4):
            backward(model, 4 * update + micro, 0.25)
        summed = [p.grad.clone() for p in model.parameters()]
        amplifier.step()
        factor = 2.0 if update else 1.0
        assert same([p.grad for p in model.parameters()], [g * factor for g in summed])
        optimizer.step()
    assert steps(amplifier) == [3, 3, 3]


def test_attach_counts_updates_not_micro_batches() -> None:
    model = network()
    amplifier = Amplifier(model, **ALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    amplifier.attach(optimizer)
    for number in range(8):
        backward(model, number)
        if number % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert steps(amplifier) == [2, 2, 2]


# ---- weights that are loaded, averaged, converted --------------------------------------


@pytest.mark.parametrize("told", ["zero_grad", "rebind", "attach", "GradScaler"])
def test_load_state_dict_with_assign(place: Place, told: str) -> None:
    """The parameters are other objects then, and need a new optimizer; layers go on by name.

    The old ones keep gradients that nobody renews, unless they were zeroed before.
    """
    results = []
    for assign in (False, True):
        model = network(place.device)
        amplifier = place.amplifier(model, **QUICK)
        train(model, amplifier, range(4))
        if told == "zero_grad":
            model.zero_grad()
        if assign:
            loaded = {name: value.clone() for name, value in model.state_dict().items()}
            model.load_state_dict(loaded, assign=True)
        if told == "rebind":
            amplifier.rebind()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if told == "attach":
            amplifier.attach(optimizer)
        scaler = gradamp_fast.GradScaler(amplifier, place.device, enabled=told == "GradScaler")
        for number in range(4, 8):
            optimizer.zero_grad()
            backward(model, number)
            if told == "GradScaler":
                scaler.scale(torch.zeros((), device=place.device))
                for p in model.parameters():
                    p.grad *= 65536.0
                scaler.step(optimizer)
                scaler.update()
            elif told == "attach":
                optimizer.step()
            else:
                amplifier.step()
                optimizer.step()
        results.append((repr(amplifier.report()), weights(model)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


def test_a_meta_model_that_is_loaded_with_assign(place: Place) -> None:
    """Made before its weights are there."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    amplifier = place.amplifier(model, **QUICK)
    real = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).to(place.device)
    model.load_state_dict(real.state_dict(), assign=True)
    train(model, amplifier, range(4))
    assert steps(amplifier) == [4, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_to_another_device_in_training() -> None:
    """State moves along, by name."""
    model = network()
    amplifier = Amplifier(model, **QUICK)
    train(model, amplifier, range(4))
    model.cuda()
    train(model, amplifier, range(4, 8))
    assert steps(amplifier) == [8, 8, 8]
    assert amplifier.factor.is_cuda


def average(kind: str, model: nn.Module) -> nn.Module:
    if kind == "copy":
        return copy.deepcopy(model)
    averaging = get_ema_multi_avg_fn(0.9) if kind == "EMA" else None
    return AveragedModel(model, multi_avg_fn=averaging)


@pytest.mark.parametrize("kind", ["copy", "EMA", "SWA"])
def test_averaged_models_are_left_alone(place: Place, kind: str) -> None:
    """A copy is made after steps, lives beside the model, and changes nothing."""
    results = []
    for averaged in (False, True):
        model = network(place.device)
        amplifier = place.amplifier(model, **QUICK)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        schedule = SWALR(optimizer, swa_lr=0.01) if averaged and kind == "SWA" else None
        other = None
        for number in range(8):
            optimizer.zero_grad()
            backward(model, number)
            amplifier.step()
            optimizer.step()
            if averaged and number == 3:
                other = average(kind, model)
            elif isinstance(other, AveragedModel):
                other.update_parameters(model)
        assert schedule is None or schedule.last_epoch == 0
        if isinstance(other, AveragedModel):
            update_bn([batch(0, place.device)], other, device=place.device)
        if kind != "SWA":
            results.append(weights(model))
        assert steps(amplifier) == [8, 8, 8]
    assert not results or same(*results)


def test_an_averaged_model_may_have_an_amplifier_of_its_own() -> None:
    model = network()
    train(model, first := Amplifier(model, **QUICK), range(3))
    other = AveragedModel(model)
    train(other, second := Amplifier(other, **QUICK), range(3))
    train(model, first, range(3, 5))
    assert (steps(first), steps(second)) == ([5] * 3, [3] * 3)


# ---- two players ----------------------------------------------------------------------


def test_a_gan_with_two_optimizers(place: Place) -> None:
    """The generator's backward also leaves gradients in the critic: only zeroed ones count."""
    generator = network(place.device)
    critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(place.device)
    players = {"g": generator, "c": critic}
    amplifiers = {name: place.amplifier(model, **ALL) for name, model in players.items()}
    optimizers = {n: torch.optim.SGD(m.parameters(), lr=0.05) for n, m in players.items()}
    for number in range(4):
        for name in ("c", "g"):
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            fake = generator(batch(number, place.device))
            score = critic(fake.detach() if name == "c" else fake).mean()
            (score if name == "c" else -score).backward()
            plain = [p.grad.clone() for p in players[name].parameters()]
            amplifiers[name].step()
            factor = 2.0 if number else 1.0
            amplified = [p.grad for p in players[name].parameters()]
            assert same(amplified, [g * factor for g in plain])
            optimizers[name].step()
    assert (steps(amplifiers["g"]), steps(amplifiers["c"])) == ([4] * 3, [4] * 2)


def test_a_gan_in_one_module_with_attach() -> None:
    """One Amplifier, an optimizer for each part: gradients of the other part are not touched."""
    gan = nn.ModuleDict({"g": network(), "c": nn.Linear(4, 1)})
    amplifier = Amplifier(gan, **ALL)
    optimizers = {n: torch.optim.SGD(gan[n].parameters(), lr=0.0) for n in ("g", "c")}
    for optimizer in optimizers.values():
        amplifier.attach(optimizer)
    for number in range(3):
        for name in ("c", "g"):
            gan.zero_grad()
            gan["c"](gan["g"](batch(number))).mean().backward()
            other = "g" if name == "c" else "c"
            plain = [p.grad.clone() for p in gan[other].parameters()]
            optimizers[name].step()
            assert same([p.grad for p in gan[other].parameters()], plain)
    assert set(steps(amplifier)) == {3}


# ---- again and again in one process ----------------------------------------------------


def test_a_sweep_leaves_nothing_behind() -> None:
    """Each model goes with its amplifier, and the next one's options are its own."""
    alive: list[weakref.ref[Any]] = []
    for factor in (2.0, 3.0, 4.0):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for number in range(3):
            optimizer.zero_grad()
            backward(model, number)
            amplifier = gradamp_fast.fused_amplify(model, factor=factor, **ALL)
            optimizer.step()
        assert float(amplifier.factor) == factor
        alive += [weakref.ref(model), weakref.ref(amplifier), weakref.ref(optimizer)]
        del model, optimizer, amplifier
    gc.collect()
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("door", ["attach", "GradScaler"])
def test_a_sweep_with_optimizers_that_amplify(door: str) -> None:
    alive: list[weakref.ref[Any]] = []
    for factor in (2.0, 3.0):
        model = network()
        amplifier = Amplifier(model, factor=factor, **ALL)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = None
        if door == "attach":
            amplifier.attach(optimizer)
        else:
            scaler = gradamp_fast.GradScaler(amplifier, "cpu", enabled=False)
        for number in range(2):
            optimizer.zero_grad()
            backward(model, number)
            (scaler.step(optimizer) if scaler else optimizer.step())
        assert steps(amplifier) == [2, 2, 2]
        alive += [weakref.ref(model), weakref.ref(amplifier), weakref.ref(optimizer)]
        del model, amplifier, optimizer, scaler
    gc.collect()
    assert not any(ref() is not None for ref in alive)


CELLS = {
    "model and amplifier": "model = network(); amplifier = Amplifier(model, **ALL)",
    "amplifier alone": "amplifier = Amplifier(model, **ALL)",
    "drop-in": "",
}


@pytest.mark.parametrize("cell", CELLS)
def test_a_notebook_cell_run_again(cell: str) -> None:
    """Names are bound anew while the old objects are still there."""
    names: dict[str, Any] = {**globals(), "model": network()}
    loop = "for number in range(3):\n    model.zero_grad()\n    backward(model, number)\n    "
    step = "gradamp_fast.fused_amplify(model, **ALL)" if cell == "drop-in" else "amplifier.step()"
    for _ in range(2):
        exec(f"{CELLS[cell]}\n{loop}{step}", names)
    if cell != "drop-in":
        assert steps(names["amplifier"]) == [3, 3, 3]


def test_a_notebook_cell_that_attaches_again() -> None:
    """The optimizer still holds the first amplifier: said in the first step."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    Amplifier(model, **ALL).attach(optimizer)
    backward(model, 0)
    optimizer.step()
    again = Amplifier(model, **ALL)
    again.attach(optimizer)
    with pytest.raises(ValueError, match="already belongs to another living Amplifier"):
        optimizer.step()


# ---- wrappers and copies ---------------------------------------------------------------


def test_a_compiled_model_is_the_model() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.05)
    for number in range(3):
        optimizer.zero_grad()
        backward(compiled, number)
        amplifier = gradamp_fast.fused_amplify(compiled if number % 2 else model, **ALL)
        optimizer.step()
    assert steps(amplifier) == [3, 3, 3]
    assert [row.name for row in amplifier.report().layers] == ["0", "2", "4"]


def test_a_copied_optimizer_does_not_amplify() -> None:
    """copy.deepcopy drops hooks: attach to the copy."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    amplifier = Amplifier(model, **ALL)
    amplifier.attach(optimizer)
    pair = copy.deepcopy({"model": model, "optimizer": optimizer})
    backward(pair["model"], 0)
    pair["optimizer"].step()
    backward(model, 0)
    optimizer.step()
    assert steps(amplifier) == [1, 1, 1]
    own = Amplifier(pair["model"], **ALL)
    own.attach(pair["optimizer"])
    pair["optimizer"].step()
    assert steps(own) == [1, 1, 1]


def test_an_attached_run_is_resumed_bit_for_bit(place: Place) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, Amplifier]:
        model = network(place.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        amplifier = place.amplifier(model, **QUICK)
        amplifier.attach(optimizer)
        return model, optimizer, amplifier

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            optimizer.zero_grad()
            backward(model, number)
            optimizer.step()

    whole, first, resumed = make(), make(), make()
    run(*whole[:2], range(10))
    run(*first[:2], range(5))
    for old, new in zip(first, resumed, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    run(*resumed[:2], range(5, 10))
    assert same(weights(resumed[0]), weights(whole[0]))
    assert repr(resumed[2].report()) == repr(whole[2].report())


def test_each_gradient_of_lbfgs_is_amplified_once(place: Place) -> None:
    model = network(place.device)
    amplifier = place.amplifier(model, **ALL)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    amplifier.attach(optimizer)
    plain: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        backward(model, 0)
        plain[:] = [p.grad.clone() for p in model.parameters()]
        return torch.ones((), device=place.device)

    for number in range(2):
        optimizer.step(closure)
        assert same([p.grad for p in model.parameters()], [g * 2.0 for g in plain]), number
