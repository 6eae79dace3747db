"""The fused optimizers in training stacks, against the same training written out."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import (
    BATCH,
    EPOCHS,
    OPTIONS,
    batches,
    in_two_ways,
    loss_of,
    make_data,
    make_loader,
    make_model,
    make_scaler,
    same,
    weights,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradamp_fast
from gradamp_fast import Amplifier, optim

RATE = 0.01


def written_out(accumulate: int = 1, half: bool = False, **options: Any) -> list[Tensor]:
    model = make_model()
    optimizer = optim.AdamW(model.parameters(), RATE)
    amplifier = Amplifier(model, **{**OPTIONS, **options})
    amplifier.attach(optimizer)
    scaler = make_scaler() if half else torch.amp.GradScaler("cpu", enabled=False)
    for index, (x, y) in enumerate(batches(amplifier), 1):
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = loss_of(model, x, y)
        scaler.scale(loss / accumulate).backward()
        if index % accumulate == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    report = amplifier.report()
    assert report.steps == EPOCHS * 6 // accumulate
    assert {layer.acts_on for layer in report.layers} == {"update"}
    assert (report.skipped_steps > 0) == half
    return weights(model)


def test_it_is_not_the_training_without_an_amplifier() -> None:
    model = make_model()
    optimizer = optim.AdamW(model.parameters(), RATE)
    for x, y in batches(Amplifier(make_model(), **OPTIONS)):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    assert not same(weights(model), written_out())
    assert same(written_out(), written_out())


# ---- stacks -------------------------------------------------------------------------


@in_two_ways
@pytest.mark.parametrize("half", [False, True], ids=["", "half"])
def test_lightning(accumulate: int, norm: dict[str, float], half: bool) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.plugins.precision import MixedPrecision

    from gradamp_fast.integrations.lightning import GradientAmplification

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return loss_of(self.net, *batch)

        def configure_optimizers(self) -> Any:
            return optim.AdamW(self.net.parameters(), RATE)

    callback = GradientAmplification(**OPTIONS, **norm)
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    plugins = [MixedPrecision("16-mixed", "cpu", make_scaler())] if half else []
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=[callback], plugins=plugins,
        accumulate_grad_batches=accumulate, **quiet,
    )  # fmt: skip
    module = Module()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="gradamp_fast")
        trainer.fit(module, make_loader())
    assert callback.amplifier.report().steps == EPOCHS * 6 // accumulate
    assert not trainer.optimizers[0].amplifiers
    assert same(weights(module.net), written_out(accumulate, half, **norm))


@in_two_ways
def test_accelerate(accumulate: int, norm: dict[str, float]) -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = make_model()
    model, optimizer, data = accelerator.prepare(
        model, optim.AdamW(model.parameters(), RATE), make_loader()
    )
    amplifier = Amplifier(model, **OPTIONS, **norm)
    amplifier.attach(optimizer)
    for epoch in range(EPOCHS):
        amplifier.set_epoch(epoch)
        for x, y in data:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, x, y))
                optimizer.step()
                optimizer.zero_grad()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    assert same(weights(model), written_out(accumulate, **norm))


@in_two_ways
def test_the_trainer(tmp_path: Path, accumulate: int, norm: dict[str, float]) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from gradamp_fast.integrations.huggingface import GradientAmplificationCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": loss_of(self.net, x, y)}

    model, callback = Model(), GradientAmplificationCallback(**OPTIONS, **norm)
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, use_cpu=True,
        train_sampling_strategy="sequential", lr_scheduler_type="constant", max_grad_norm=0,
        save_strategy="no", report_to="none", disable_tqdm=True,
        gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"x": x, "y": y} for x, y in zip(*make_data(), strict=True)],
        optimizers=(optim.AdamW(model.parameters(), RATE), None),
        callbacks=[callback],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="gradamp_fast")
        trainer.train()
    assert same(weights(model.net), written_out(accumulate, **norm))


# ---- torch.compile --------------------------------------------------------------------


@pytest.mark.parametrize("attached", [False, True])
def test_a_compiled_training_step(attached: bool) -> None:
    """The graph breaks at the update, which is what it is; ``fullgraph=True`` is refused."""
    trained = []
    for compiled in (False, True):
        model = make_model()
        optimizer = optim.AdamW(model.parameters(), RATE)
        amplifier = Amplifier(model, factor=4.0, min_steps=2, refresh=2, decay=0.9)
        if attached:
            amplifier.attach(optimizer)

        def step(x: Tensor, y: Tensor, model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            optimizer.step()
            return loss

        call = torch.compile(step, backend="eager") if compiled else step
        for _ in range(2):
            for x, y in zip(*(part.split(BATCH) for part in make_data()), strict=True):
                call(x, y)
        assert amplifier.report().steps == (12 if attached else 0)
        trained.append(weights(model))
    assert same(*trained)
    with pytest.raises(Exception, match=r"torch\._dynamo|disable|graph break|Unsupported"):
        torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()
    torch._dynamo.reset()


# ---- all of it at once ------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleList(nn.Linear(6, 6) for _ in range(blocks))
        self.head = nn.Linear(6, 3)
        self.body[0].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body:
            x = block(x).tanh()
        return self.head(x)


class Training:
    """AMP, accumulation, clipping, EMA, two optimizers, a warm-up, a model that grows and thaws."""

    def __init__(self, blocks: int) -> None:
        self.model = Network(blocks)
        self.body = optim.AdamW(self.model.body.parameters(), 3e-3)
        self.head = optim.SGD(self.model.head.parameters(), 3e-3, momentum=0.9, dampening=0.1)
        self.schedules = [
            torch.optim.lr_scheduler.OneCycleLR(o, 3e-3, 30, pct_start=0.2, cycle_momentum=False)
            for o in (self.body, self.head)
        ]
        self.amplifier = Amplifier(self.model, grow=True, min_steps=3, refresh=2)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        for optimizer in (self.body, self.head):
            self.amplifier.attach(optimizer)

    def grow(self) -> None:
        self.model.body.append(nn.Linear(6, 6))
        nn.init.eye_(self.model.body[-1].weight)
        nn.init.zeros_(self.model.body[-1].bias)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.body.add_param_group({"params": self.model.body[-1].parameters(), "max_lr": 3e-3,
                                   "initial_lr": 1e-4, "min_lr": 1e-8, "lr": 1e-3})  # fmt: skip

    def step(self, number: int) -> None:
        if number == 6:
            self.model.body[0].requires_grad_(True)
        for part in range(2):
            generator = torch.Generator().manual_seed(2 * number + part)
            x = torch.randn(16, 6, generator=generator)
            with torch.autocast("cpu", torch.bfloat16):
                loss = (self.model(x).float() - x[:, :3] - 1).square().mean() / 2
            scale = torch.inf if number == 3 else 1.0
            self.scaler.scale(loss * scale).backward()
        for optimizer in (self.body, self.head):
            self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in (self.body, self.head):
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        for schedule in self.schedules:
            schedule.step()
        self.ema.update_parameters(self.model)

    def state(self) -> list[Any]:
        keepers = (self.model, self.body, self.head, *self.schedules, self.ema, self.scaler)
        return [copy.deepcopy(k.state_dict()) for k in (*keepers, self.amplifier)]

    def load(self, state: list[Any]) -> None:
        keepers = (self.model, self.body, self.head, *self.schedules, self.ema, self.scaler)
        for keeper, of in zip((*keepers, self.amplifier), state, strict=True):
            keeper.load_state_dict(of)


def test_all_of_it_at_once() -> None:
    """And resumed in the middle, bit for bit."""
    results = []
    for resumes in (False, True):
        training = Training(2)
        for number in range(28):
            if number == 9:
                training.grow()
            if number == 17 and resumes:
                state, training = training.state(), Training(2)
                training.grow()
                training.model.body[0].requires_grad_(True)
                training.load(state)
            training.step(number)
        results.append(training)
    whole, resumed = results
    assert same(weights(whole.model), weights(resumed.model))
    assert same(weights(whole.ema), weights(resumed.ema))
    report = whole.amplifier.report()
    assert report == resumed.amplifier.report()
    assert (report.steps, report.skipped_steps) == (28, 1)
    assert {x.name: x.acts_on for x in report.layers}["head"] == "gradient"
    assert {x.name: x.acts_on for x in report.layers}["body.2"] == "update"
    assert max(layer.factor for layer in report.layers) > 1
    assert min(layer.steps for layer in report.layers) == 28 - 9
    assert not any(p.isnan().any() for p in whole.ema.parameters())
    gradamp_fast.reset(whole.model)
