"""The environment, the Trainer's settings, and an Amplifier that outlives its model."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Place
from factors import ALWAYS, backward, network, only, sgd, steps
from torch import Tensor, nn

from gradamp_fast import Amplifier, doctor

# ---- GRADAMP_BACKEND -----------------------------------------------------------------


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_backend_is_an_unset_one(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("GRADAMP_BACKEND", value)
    model = network()
    amplifier = Amplifier(model, **ALWAYS)
    raw = backward(model)
    amplifier.step()
    assert only(model, raw) == 2.0
    assert doctor.diagnose()[1]


@pytest.mark.parametrize("command", [["doctor"], ["info"]])
def test_a_reader_that_goes_away(command: list[str]) -> None:
    """``python -m gradamp_fast doctor | head -1`` ends without a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "gradamp_fast", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read().decode()
    process.wait()
    assert "Traceback" not in error
    assert "Exception ignored" not in error


# ---- the Trainer ------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(x).square().mean()}


class Endless(torch.utils.data.IterableDataset):
    """Eight samples, and nobody knows how many."""

    def __iter__(self) -> Any:
        return iter([{"x": torch.full((6,), float(i))} for i in range(8)])


def trainer(folder: Any, callback: Any, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = Model()
    args = transformers.TrainingArguments(
        str(folder),
        **{
            "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_grad_norm": 0,
            "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3, **options,
        },
    )  # fmt: skip
    made = transformers.Trainer(
        model=model,
        args=args,
        train_dataset=Endless(),
        optimizers=(sgd(model.parameters(), lr=0.01), None),
        callbacks=[callback],
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def callback_of(**options: Any) -> Any:
    pytest.importorskip("transformers")
    from gradamp_fast.integrations.huggingface import GradientAmplificationCallback

    return GradientAmplificationCallback(**{**ALWAYS, **options})


@pytest.mark.parametrize("norm", [None, 0, 0.0])
def test_no_max_grad_norm(norm: Any) -> None:
    model = network()
    callback = callback_of()
    args = SimpleNamespace(max_grad_norm=norm, save_strategy="no")
    state = SimpleNamespace(epoch=0.0, global_step=0, stateful_callbacks={})
    callback.on_train_begin(args, state, None, model=model, optimizer=sgd(model.parameters()))
    assert callback.amplifier is not None


class Heard:
    """The epochs that the amplifier was told, with the step it was told them at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.epochs: list[tuple[int, int]] = []
        tell = Amplifier.set_epoch

        def spy(amplifier: Amplifier, epoch: int) -> None:
            self.epochs.append((amplifier.report().steps, epoch))
            tell(amplifier, epoch)

        monkeypatch.setattr(Amplifier, "set_epoch", spy)


@pytest.mark.parametrize(
    ("stop", "told"),
    [
        (3, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]),
        (4, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]),
        (6, [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]),  # the Trainer begins the data anew
    ],
)
def test_an_unset_length_and_a_resume(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, stop: int, told: list[int]
) -> None:
    """Four steps an epoch, which the Trainer cannot know: the epochs go on where they were."""
    heard = Heard(monkeypatch)
    trainer(tmp_path, callback_of(), max_steps=stop, save_steps=stop).train()
    again = trainer(tmp_path, callback_of(), max_steps=10)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    at = dict(heard.epochs)  # the last one told at each step
    assert [at[max(s for s in at if s <= step)] for step in range(10)] == told


# ---- an Amplifier that outlives its model -----------------------------------------------------


@pytest.mark.parametrize("used", ["stepped", "attached", "new"])
def test_it_does_not_keep_the_parameters(place: Place, used: str) -> None:
    model = network(place.device)
    amplifier = place.amplifier(model, **ALWAYS)
    if used != "new":
        optimizer = sgd(model.parameters())
        if used == "attached":
            amplifier.attach(optimizer)
        backward(model)
        optimizer.step() if used == "attached" else amplifier.step()
        del optimizer
    parameters = [weakref.ref(p) for p in model.parameters()]
    before = repr(amplifier.report().layers)
    del model
    gc.collect()
    assert all(p() is None for p in parameters)
    assert repr(amplifier.report().layers) == before
    assert set(steps(amplifier)) == {"0", "2", "4"}
    amplifier.state_dict()
    with pytest.raises(RuntimeError, match="model"):
        amplifier.step()
