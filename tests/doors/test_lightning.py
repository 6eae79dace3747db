"""The Lightning callback, against the same training written out."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from stacks import (
    EPOCHS,
    OPTIONS,
    batches,
    by_hand,
    check_fused,
    loss_of,
    make_loader,
    make_model,
    make_optimizer,
    make_scaler,
    same,
    weights,
)
from torch import Tensor

from gradamp_fast import Amplifier

pytest.importorskip("lightning")
import lightning.pytorch
import pytorch_lightning
from lightning.pytorch.plugins.precision import MixedPrecision

from gradamp_fast.integrations.lightning import GradientAmplification

pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|tensorboardX|GPU|logging interval)")


def make_module(package: ModuleType = lightning.pytorch, **sgd: Any) -> Any:
    class Module(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return loss_of(self.net, *batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(self.net, **sgd)

    return Module()


class Manual(lightning.pytorch.LightningModule):
    """Two optimizers, which step in turn on the gradients of one loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = make_model()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [make_optimizer(self.net[:2]), make_optimizer(self.net[2:])]

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.zero_grad()
        self.manual_backward(loss_of(self.net, *batch))
        for optimizer in self.optimizers():
            optimizer.step()


def trainer(package: ModuleType = lightning.pytorch, **options: Any) -> Any:
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return package.Trainer(**{"max_epochs": EPOCHS, "accelerator": "cpu", **quiet, **options})


def fit(module: Any, trainer: Any, **options: Any) -> list[Tensor]:
    trainer.fit(module, make_loader(), **options)
    return weights(module.net)


@pytest.mark.parametrize(
    ("package", "accumulate", "clip"),
    [
        (lightning.pytorch, 1, None),
        (lightning.pytorch, 3, None),
        (lightning.pytorch, 2, 0.5),
        (pytorch_lightning, 2, 0.5),
    ],
)
def test_same_as_by_hand(package: ModuleType, accumulate: int, clip: float | None) -> None:
    callback = GradientAmplification(**OPTIONS)
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    found = fit(make_module(package), trainer(package, callbacks=[callback], **options))
    assert callback.amplifier.report().steps == EPOCHS * 6 // accumulate
    assert same(found, by_hand(accumulate=accumulate, clip=clip))


def test_the_optimizers_own_hook_would_be_late() -> None:
    """Lightning's gradients are made inside of optimizer.step; clipping comes there too."""

    class Hooked(lightning.pytorch.Callback):
        def __init__(self, attach: bool) -> None:
            self.attach = attach

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.amplifier = Amplifier(pl_module, **OPTIONS)
            [optimizer] = trainer.optimizers
            if self.attach:
                self.amplifier.attach(optimizer)
            else:
                optimizer.register_step_pre_hook(lambda *_: self.amplifier.step())

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.amplifier.set_epoch(trainer.current_epoch)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no parameter has a gradient")
        naive = fit(make_module(), trainer(callbacks=[Hooked(attach=False)]))
    assert not same(naive, by_hand())
    attached = fit(make_module(), trainer(callbacks=[Hooked(attach=True)]))
    assert same(attached, by_hand())
    clipped = trainer(callbacks=[Hooked(attach=True)], gradient_clip_val=0.5)
    assert not same(fit(make_module(), clipped), by_hand(clip=0.5))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_half_precision(clip: float | None) -> None:
    """Unscaled before, clipped after, and a step that overflows is skipped."""
    callback = GradientAmplification(**OPTIONS)
    plugin = MixedPrecision("16-mixed", "cpu", make_scaler())
    half = trainer(callbacks=[callback], plugins=[plugin], gradient_clip_val=clip)
    assert same(fit(make_module(), half), by_hand(half=True, clip=clip))
    assert callback.amplifier.report().skipped_steps > 0


def test_half_precision_with_an_optimizer_that_unscales_itself() -> None:
    callback = GradientAmplification(**OPTIONS)
    plugin = MixedPrecision("16-mixed", "cpu", make_scaler())
    module = make_module(fused=True)
    fit(module, trainer(callbacks=[callback], plugins=[plugin]))
    check_fused(module.net, callback.amplifier)


def test_manual_optimization_with_two_optimizers() -> None:
    """Each optimizer's step amplifies its own parameters, once; both are one step, as of one."""
    callback = GradientAmplification(**OPTIONS)
    found = fit(Manual(), trainer(callbacks=[callback]))
    model = make_model()
    optimizers = [make_optimizer(model[:2]), make_optimizer(model[2:])]
    amplifier = Amplifier(model, **OPTIONS)
    for optimizer in optimizers:
        amplifier.attach(optimizer)
    for x, y in batches(amplifier):
        model.zero_grad()
        loss_of(model, x, y).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert same(found, weights(model))
    assert same(found, by_hand())


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    path = tmp_path / "half-way.ckpt"
    first = trainer(callbacks=[GradientAmplification(**OPTIONS)], max_epochs=2)
    fit(make_module(), first)
    first.save_checkpoint(path)

    def resume() -> list[Tensor]:
        callbacks = [GradientAmplification(**OPTIONS)]
        return fit(make_module(), trainer(callbacks=callbacks), ckpt_path=path)

    assert same(resume(), by_hand())

    checkpoint = torch.load(path, weights_only=True)
    [stored] = [key for key in checkpoint["callbacks"] if key.startswith("GradientAmplification")]
    del checkpoint["callbacks"][stored]
    torch.save(checkpoint, path)
    assert not same(resume(), by_hand())


def test_a_checkpoint_read_but_not_trained_from_keeps_its_state() -> None:
    stored = Amplifier(make_model()).state_dict()
    callback = GradientAmplification()
    assert callback.state_dict() == {}
    callback.load_state_dict(stored)
    assert callback.state_dict() == stored


def test_fit_again() -> None:
    """The same model goes on, another one begins anew; nothing of the first keeps it waiting."""
    callback = GradientAmplification(**OPTIONS)
    module = make_module()
    for total in (6, 12):
        fit(module, trainer(callbacks=[callback], max_epochs=1))
        assert callback.amplifier.report().steps == total
        assert not callback.amplifier.attached
    fit(make_module(), trainer(callbacks=[callback], max_epochs=1))
    assert callback.amplifier.report().steps == 6


def test_what_is_wrong_is_said_early() -> None:
    with pytest.raises(ValueError, match="did you mean 'factor'"):
        GradientAmplification(facter=2.0)


def test_an_optimizer_that_divides_the_factor_out_warns_once() -> None:
    module = make_module()
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters())
    with pytest.warns(UserWarning, match="Adam divides out") as caught:
        fit(module, trainer(callbacks=[GradientAmplification()]))
    assert len([w for w in caught if "divides out" in str(w.message)]) == 1
