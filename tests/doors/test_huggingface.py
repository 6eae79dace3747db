"""The callback for the Hugging Face Trainer, against the same training written out."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import run
from stacks import (
    BATCH,
    EPOCHS,
    OPTIONS,
    by_hand,
    in_two_ways,
    loss_of,
    make_data,
    make_model,
    make_optimizer,
    same,
    weights,
)
from torch import Tensor, nn

from gradamp_fast import Amplifier

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
import transformers

from gradamp_fast.integrations.huggingface import GradientAmplificationCallback


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_of(self.net, x, y)}


def make_trainer(folder: Path, *callbacks: Any, model: Model | None = None, **options: Any) -> Any:
    """Each of its defaults that is changed here is one that changes the weights."""
    args = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "save_strategy": "epoch",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }
    model = model or Model()
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(str(folder), **args),
        train_dataset=[{"x": x, "y": y} for x, y in zip(*make_data(), strict=True)],
        optimizers=(make_optimizer(model), None),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train(trainer: Any, **options: Any) -> list[Tensor]:
    trainer.train(**options)
    return weights(trainer.model.net)


@in_two_ways
def test_same_as_by_hand(tmp_path: Path, accumulate: int, norm: dict[str, float]) -> None:
    callback = GradientAmplificationCallback(**OPTIONS, **norm)
    trainer = make_trainer(tmp_path, callback, gradient_accumulation_steps=accumulate)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="gradamp_fast")
        found = train(trainer)
    assert callback.amplifier.report().steps == EPOCHS * 6 // accumulate
    assert same(found, by_hand(accumulate=accumulate, **norm))


class Naive(transformers.TrainerCallback):
    """Amplifies at an event, and knows of no checkpoint."""

    def __init__(self, event: str) -> None:
        setattr(self, event, lambda *args, **kwargs: self.amplifier.step())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.amplifier = Amplifier(kwargs["model"], **OPTIONS)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.amplifier.set_epoch(int(state.epoch))


@pytest.mark.filterwarnings("ignore:no parameter has a gradient")
@pytest.mark.parametrize("event", ["on_substep_end", "on_step_begin", "on_step_end"])
def test_other_events_are_not_the_place(tmp_path: Path, event: str) -> None:
    trainer = make_trainer(tmp_path, Naive(event), gradient_accumulation_steps=2)
    assert not same(train(trainer), by_hand(accumulate=2))


def test_the_trainers_clipping_comes_before_and_is_warned_of(tmp_path: Path) -> None:
    callback = GradientAmplificationCallback(**OPTIONS)
    trainer = make_trainer(tmp_path, callback, max_grad_norm=0.5)
    with pytest.warns(UserWarning, match=r"max_grad_norm=0 .* max_norm=0\.5"):
        found = train(trainer)
    assert not same(found, by_hand(clip=0.5))


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize(
    ("half_way", "accumulate"), [("checkpoint-12", 1), ("checkpoint-9", 1), ("checkpoint-6", 2)]
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, half_way: str, accumulate: int, restore: bool
) -> None:
    """At the end of an epoch or within, from another place, whatever the Trainer restores."""
    options = {
        "gradient_accumulation_steps": accumulate,
        "save_strategy": "steps",
        "save_steps": 3,
        "restore_callback_states_from_checkpoint": restore,
    }
    train(make_trainer(tmp_path / "first", GradientAmplificationCallback(**OPTIONS), **options))
    checkpoint = tmp_path / "elsewhere"
    (tmp_path / "first" / half_way).rename(checkpoint)

    def resume(*callbacks: Any) -> list[Tensor]:
        trainer = make_trainer(tmp_path / "second", *callbacks, **options)
        return train(trainer, resume_from_checkpoint=str(checkpoint))

    expected = by_hand(accumulate=accumulate)
    assert same(resume(GradientAmplificationCallback(**OPTIONS)), expected)
    assert not same(resume(Naive("on_pre_optimizer_step")), expected)


def test_a_checkpoint_from_before_amplification(tmp_path: Path) -> None:
    """The amplifier begins; the next checkpoint can be written."""
    train(make_trainer(tmp_path, num_train_epochs=1))
    callback = GradientAmplificationCallback(**OPTIONS)
    with pytest.warns(UserWarning, match="holds no state of a GradientAmplificationCallback"):
        train(make_trainer(tmp_path, callback), resume_from_checkpoint=True)
    assert callback.amplifier.report().steps == (EPOCHS - 1) * 6
    stored = json.loads((tmp_path / "checkpoint-24" / "trainer_state.json").read_text())
    assert stored["stateful_callbacks"]["GradientAmplificationCallback"]["amplifier"]


def test_options_that_are_functions(tmp_path: Path) -> None:
    """JSON cannot hold them: they come from the callback that the resumed run is given."""
    options = {**OPTIONS, "group_by": str.upper}
    train(make_trainer(tmp_path, GradientAmplificationCallback(**options), num_train_epochs=2))
    callback = GradientAmplificationCallback(**options)
    found = train(make_trainer(tmp_path, callback), resume_from_checkpoint=True)
    assert same(found, by_hand(group_by=str.upper))


def test_other_options_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    train(make_trainer(tmp_path, GradientAmplificationCallback(**OPTIONS), num_train_epochs=1))
    other = GradientAmplificationCallback(**{**OPTIONS, "factor": 3.0})
    with pytest.raises(ValueError, match=r"factor was 4\.0 and is 3\.0"):
        train(make_trainer(tmp_path, other), resume_from_checkpoint=True)


def test_train_again_begins_anew(tmp_path: Path) -> None:
    callback = GradientAmplificationCallback(**OPTIONS)
    trainer = make_trainer(tmp_path, callback, num_train_epochs=1)
    for _ in range(2):
        train(trainer)
        assert callback.amplifier.report().steps == 6
        assert not callback.amplifier.attached
    train(make_trainer(tmp_path, callback, num_train_epochs=1))
    assert callback.amplifier.report().steps == 6


def test_what_is_wrong_is_said_early(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'factor'"):
        GradientAmplificationCallback(facter=2.0)
    trainer = make_trainer(tmp_path, GradientAmplificationCallback(), num_train_epochs=1)
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())
    with pytest.warns(UserWarning, match="AdamW divides out"):
        train(trainer)


def _in_parallel(rank: int, folder: str) -> tuple[list[list[Tensor]], str]:
    """A run, and the same one resumed in its middle; what is said of sharded gradients."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, and not used
    options = {"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 3}
    found = []
    for resume in ({}, {"resume_from_checkpoint": f"{folder}/checkpoint-6"}):
        callback = GradientAmplificationCallback(**OPTIONS)
        found.append(train(make_trainer(Path(folder), callback, **options), **resume))
    return found, _sharded()


@pytest.mark.slow
def test_in_two_processes(tmp_path: Path) -> None:
    """All decide alike, and all go on from the state that the first one saved.

    Checkpoints of sharded gradients are refused: one process would wait for ever for the others.
    """
    (tmp_path / "run").mkdir()
    returned = run(_in_parallel, 2, tmp_path / "run", str(tmp_path / "out"))
    expected = returned[0][0][0]
    assert not same(expected, by_hand())  # the batches are twice as large
    assert all(same(found, expected) for process, _ in returned for found in process)
    assert all("save_strategy='no'" in message for _, message in returned)


def _sharded() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(make_model(), mesh=init_device_mesh("cpu", (2,)))
    args = SimpleNamespace(max_grad_norm=0, save_strategy="epoch")
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        GradientAmplificationCallback().on_train_begin(args, None, None, model=model)
    return str(raised.value)
