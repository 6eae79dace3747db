"""Hugging Face Trainer: a callback that amplifies and that checkpoints bring back."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sized
from typing import Any

import torch

from ..amplifier import Amplifier
from ..attachment import Attachment
from ..model.walk import unwrap
from ..options import Options

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        "gradamp_fast.integrations.huggingface needs transformers: pip install 'gradamp_fast[hf]'"
    ) from error


class GradientAmplificationCallback(TrainerCallback, ExportableState):
    """A callback that amplifies a model's gradients before each optimizer step.

    It attaches to the Trainer's optimizer: once for each update under gradient accumulation, after
    unscaling, not in steps that overflow, and after ``max_grad_norm`` has clipped. Set that to 0
    and give ``max_norm`` here, which clips what was amplified. Calls ``set_epoch`` with the
    Trainer's epoch. ``train(resume_from_checkpoint=...)`` continues from the state that
    ``trainer_state.json`` holds; any other ``train()`` begins anew. Options are those of
    ``Options``; a schedule may also be given as ``Schedule.to_dict()``.

    Attributes:
        amplifier: the model's ``Amplifier``; None until training starts.

    Raises ValueError for options out of range. When training starts, warns and raises as
    ``Amplifier.attach`` does, and raises ValueError if checkpoints of sharded gradients (FSDP2)
    are to be saved.
    """

    def __init__(self, **options: Any) -> None:
        self.amplifier: Amplifier | None = None
        self._options = Options.from_dict(options)
        self._attachment: Attachment | None = None
        self._epoch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything is prepared and, in a resumed run, restored."""
        if args.max_grad_norm:
            warnings.warn(
                f"max_grad_norm={args.max_grad_norm} clips gradients before they are amplified, so "
                "an update may exceed it: give TrainingArguments max_grad_norm=0 and "
                f"GradientAmplificationCallback max_norm={args.max_grad_norm}",
                stacklevel=2,
            )
        self.on_train_end(args, state, control)
        model = kwargs["model"]
        if self.amplifier is None or self.amplifier.bound.model is not unwrap(model):
            self.amplifier = None  # before its successor, which may want the same parameters
            self.amplifier = Amplifier(model, **vars(self._options))
        if self.amplifier.bound.plan.sharded and args.save_strategy != "no":
            raise ValueError(
                "the Trainer asks one process alone for a callback's state, and that of sharded "
                "gradients takes all of them: give TrainingArguments save_strategy='no', or attach "
                "the amplifier in a loop of your own"
            )
        self.amplifier.reset()
        self._resume(state, kwargs.get("train_dataloader"))
        self._attachment = self.amplifier.attach(kwargs["optimizer"])

    def _resume(self, state: Any, batches: Any) -> None:
        """``state`` is the checkpoint's in a resumed run; the Trainer leaves our part to us."""
        assert self.amplifier is not None
        self._epoch = int(state.epoch)
        # The Trainer looks the key up when it saves, and an older checkpoint may be without.
        found = state.stateful_callbacks.setdefault(type(self).__name__, {})
        if state.global_step == 0:
            return
        if stored := found.get("amplifier"):
            self.amplifier.load_state_dict(_decode(stored))
            if not isinstance(getattr(batches, "dataset", None), Sized):
                # The Trainer does not know how long an epoch is, and takes max_steps for it.
                self._epoch = max(self.amplifier.bound.epoch, 0)
        else:
            warnings.warn(
                "the checkpoint holds no state of a GradientAmplificationCallback: the amplifier "
                "begins at its first step",
                stacklevel=3,
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.amplifier is not None
        self.amplifier.set_epoch(self._epoch)
        self._epoch += 1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def state(self) -> dict[str, Any]:
        """What the Trainer writes to ``trainer_state.json``.

        ``args`` make this callback again under ``restore_callback_states_from_checkpoint``, unless
        an option is a function.
        """
        options = self._options.to_dict()
        return {
            "args": {} if any(map(callable, options.values())) else options,
            "attributes": {},
            "amplifier": _encode(self.amplifier.state_dict()) if self.amplifier else None,
        }


def _encode(state_dict: Mapping[str, Any]) -> str:
    buffer = io.BytesIO()
    torch.save(dict(state_dict), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _decode(text: str) -> dict[str, Any]:
    stored: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
    return stored
