"""Lightning: a callback that amplifies before gradients are clipped."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch.optim import Optimizer

from ..amplifier import Amplifier
from ..attach import BeforeStep, attach, updates_itself
from ..attachment import Attachment, innermost
from ..model.walk import unwrap
from ..options import Options

# The library goes by two names with classes of their own; the callback serves trainers of both.
_NAMES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
_BASES: Any = [import_module(_NAMES[name]).Callback for name in _NAMES if find_spec(name)]
if not _BASES:
    raise ImportError(
        "gradamp_fast.integrations.lightning needs lightning: pip install 'gradamp_fast[lightning]'"
    )


class GradientAmplification(*_BASES):  # type: ignore[misc]
    """A callback that amplifies a LightningModule's gradients before each optimizer step.

    The place is after unscaling and before ``gradient_clip_val``; with gradient accumulation,
    once for each update; with several optimizers, each one's parameters before its own steps.
    Calls ``set_epoch`` with the trainer's epoch. Its state is part of the trainer's checkpoints.
    Options are those of ``Options``.

    Attributes:
        amplifier: the module's ``Amplifier``; None until training starts.

    Raises ValueError for options out of range. When training starts, warns and raises as
    ``Amplifier.attach`` does.
    """

    def __init__(self, **options: Any) -> None:
        self.amplifier: Amplifier | None = None
        self._options = Options.make(options)
        self._stored: Mapping[str, Any] = {}
        self._steps: dict[Optimizer, Attachment] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The first hook at which optimizers are made and checkpoints restored everywhere."""
        self.on_train_end(trainer, pl_module)
        if self.amplifier is None or self.amplifier.bound.model is not unwrap(pl_module):
            self.amplifier = None  # before its successor, which may want the same parameters
            self.amplifier = Amplifier(pl_module, **vars(self._options))
        if self._stored:
            self.amplifier.load_state_dict(self._stored)
            self._stored = {}
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        bound = self.amplifier.bound
        for optimizer in map(innermost, trainer.optimizers):
            # An optimizer that unscales by itself (``fused=True`` under a GradScaler) is not
            # clipped, and knows the scale only within its step: there the step is its hook.
            unscales = scaled and getattr(optimizer, "_step_supports_amp_scaling", False)
            by_itself = unscales or updates_itself(bound, optimizer)
            self._steps[optimizer] = (attach if by_itself else _WhenCalled)(bound, optimizer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        assert self.amplifier is not None
        self.amplifier.set_epoch(trainer.current_epoch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        step = self._steps[innermost(optimizer)]
        if isinstance(step, _WhenCalled):
            step.called()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for step in self._steps.values():
            step.remove()
        self._steps = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._stored) if self.amplifier is None else self.amplifier.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts: there may be no model yet."""
        self._stored = state_dict


class _WhenCalled(BeforeStep):
    """Amplifies when Lightning calls it, which is before it clips."""

    def called(self) -> None:
        optimizer = self._holding.optimizer
        if optimizer is not None:
            self._step(optimizer)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        return
