"""The Amplifier, as users see it: a step, control, a look at it, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from numbers import Integral
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.optim import Optimizer

from . import checkpoint, ops, reference
from .attach import attach
from .attachment import Attachment, innermost
from .bound_model import BoundModel
from .call import Call
from .options import Options, check_factor
from .report import (
    History,
    Report,
    ScalarWriter,
    Snapshot,
    log_scalars,
    make_report,
    render,
    take_snapshot,
)


class Amplifier:
    """Amplifies the gradients of the layers of a model that its options select.

    Between ``backward()`` and ``optimizer.step()`` call ``step()``, once for each update, or
    ``attach(optimizer)`` once. A layer is what one module owns directly, unless ``group_by``
    says otherwise. Options are those of ``Options``.

    The model is not kept alive, and nothing is stored on it but, with ``placement="backward"``,
    hooks that go with the Amplifier and do nothing in a copy of the model. From its first step
    on an Amplifier owns the model's trainable parameters; another one's first step on any of
    them is a ValueError for as long as it lives. Measures and selection rules are this
    project's reading of arXiv 2305.18445, whose formulas are not public.

    Attributes:
        options: as they were given.
        bound: the model and its optimizers as they stand.

    Raises ValueError for options out of range and a model without trainable parameters.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.options = Options.make(options)
        self.bound = BoundModel(model, self.options)
        self._history = History()

    # ---- one step -------------------------------------------------------------------

    def step(
        self,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        unscale: bool = True,
    ) -> None:
        """Measures all gradients, updates the state, decides, and multiplies in place.

        Args:
            grad_scale: what the loss was multiplied by; one fp32 element on the gradients'
                device. Gradients are measured divided by it.
            found_inf: one fp32 element on the gradients' device; not 0 skips the step, and a
                non-finite gradient found here sets it to 1.
            unscale: also divide the gradients by ``grad_scale``; False leaves that to an
                optimizer that does it itself.

        With sharded parameters all processes have to call it, and what reads the state as well.
        With gradient accumulation call it only before the optimizer's step: it would amplify
        twice. Raises RuntimeError if options count epochs and ``set_epoch`` was never called,
        TypeError or ValueError, naming the parameter, for gradients that cannot be amplified.
        """
        ops.step(self.bound, Call(grad_scale, found_inf, unscale))

    def prepare(self) -> None:
        """Allocates, uploads and loads kernels without a step, as capture in a graph needs."""
        self.bound.prepare()

    def rebind(self) -> None:
        """Walks the model again: binds new and replaced parameters, lets vanished ones go.

        Layers keep their state by name; new ones start at their first step. This also happens
        by itself when a parameter loses its gradient, and at ``set_epoch``.
        """
        self.bound.look_again()

    # ---- control --------------------------------------------------------------------

    @property
    def factor(self) -> Tensor:
        """What selected gradients are multiplied by: fp64 [], on the gradients' device; a copy.

        With ``grow=True`` what the layers' own factors grow by at each decision. Assign a number,
        or a one-element tensor, to change it from the next step on. A tensor on another device
        than the CPU is taken without looking at it: that would synchronise.
        """
        return self.bound.settled_state().scalar("factor").clone()

    @factor.setter
    def factor(self, value: float | Tensor) -> None:
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"factor must have one element, not shape {tuple(value.shape)}")
            if value.device.type == "cpu":
                check_factor(value.item(), self.options.grow)
            self.bound.settled_state().scalar("factor").copy_(value.detach().reshape(()))
        else:
            check_factor(value, self.options.grow)
            self.bound.settled_state().scalar("factor").fill_(value)
        self.bound.written()

    @property
    def total_norm(self) -> Tensor | None:
        """Global gradient norm of the last step before clipping: fp64 [], on the device.

        None unless ``max_norm`` or ``match_norm`` is set.
        """
        if not self.bound.rules.needs_norm:
            return None
        return self.bound.settled_state().scalar("total_norm").clone()

    def set_epoch(self, epoch: int) -> None:
        """Tells the epoch that begins, counted from 0.

        With ``refresh="epoch"`` a new one brings a decision from the state as it stands, and
        with ``decay=None`` all averages then begin anew.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, Integral) or epoch < 0:
            raise ValueError(f"epoch={epoch!r} is out of range: it must be a whole number >= 0")
        self.rebind()
        if self.bound.epoch == epoch:
            return
        state, rules = self.bound.settled_state(), self.bound.rules
        self.bound.epoch = int(epoch)
        state.scalar("epoch").fill_(self.bound.epoch)
        if rules.refresh == 0:
            factor = reference.active_factor(state, rules, Call())
            reference.decide(state, rules, state.scalar("epoch"), state.scalar("step"), factor)
            if rules.decay == 1:
                state.restart()
        self.bound.written()

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Steps by itself before every ``optimizer.step()``, for the optimizer's parameters.

        Closures are honoured: the step follows each of their calls. Groups with
        ``param_group["amplify"] = False`` are left alone. An optimizer that unscales gradients
        itself (``fused=True`` under a GradScaler) is left to do so. Returns a handle whose
        ``remove()`` ends it. Warns for optimizers that a constant factor does not move. With
        ``grow=True`` nothing grows or settles in a step whose learning rate is above the last
        one's; one that is a tensor on a GPU is not looked at.

        The optimizer keeps what is bound alive; a copy of it made by ``copy.deepcopy`` has no
        hook, so attach to that anew. One inside a wrapper such as Accelerate's is attached to
        itself.

        Raises ValueError if the optimizer holds none of the model's parameters, or is attached
        already, or with ``grow=True`` is not moved by a factor, TypeError if it is none, or calls
        no hooks.
        """
        return attach(self.bound, innermost(optimizer))

    def suspended(self) -> AbstractContextManager[None]:
        """A ``with`` block in which backpropagation is that of the model alone.

        For ``placement="backward"``, under which any backward pass through the model is amplified:
        input gradients, penalties on them, ``torch.func.grad``, Hessians. Elsewhere it does
        nothing, for only ``step`` amplifies.
        """
        return self.bound.suspended()

    @property
    def attached(self) -> bool:
        """Whether an optimizer calls ``step`` by itself."""
        return self.bound.attached

    def release(self) -> None:
        """With ``grow=True``: layers that have settled may grow again, from where they are.

        To be called after a change of learning rate, data or batch size. The next decision is
        like the first: it asks all layers together whether the learning rate is low. Without
        ``grow=True`` RuntimeError.
        """
        if not self.options.grow:
            raise RuntimeError("release() goes with grow=True only: here no layer settles")
        self.bound.settled_state().release()
        self.bound.written()

    def reset(self) -> None:
        """Back to before the first step, in place: no epoch is set, ``factor`` is the option's.

        The history is empty again. Options and attachments stay; ``gradamp_fast.reset(model)``
        is for other options.
        """
        self.bound.settled_state().reset()
        self.bound.epoch = -1
        self.bound.written(restored=True)
        self._history.clear()

    # ---- looking at it --------------------------------------------------------------

    def report(self) -> Report:
        """Every layer's state and the last decision; one device-to-host copy."""
        return make_report(self._snapshot())

    def summary(self) -> str:
        """The report as a table, with colours if the standard output is a terminal.

        For that rich has to be there (``[viz]`` extra); plain text otherwise. One
        device-to-host copy.
        """
        return render(self.report())

    def record(self, every: int = 1) -> History:
        """Adds a report to the history on every ``every``-th call, and returns the history.

        Call it after each epoch, or with ``every`` after each step: a call that adds nothing
        touches no device, one that does makes one device-to-host copy. The history is not part
        of ``state_dict()``. ``gradamp_fast.plot.heatmap`` draws it.

        Raises ValueError unless ``every`` >= 1.
        """
        if self._history.due(every):
            self._history.add(self._snapshot())
        return self._history

    def log_to(self, writer: ScalarWriter, step: int) -> None:
        """Writes every layer's numbers as ``gradamp/<layer>/<metric>``; one device-to-host copy.

        ``writer`` is a ``torch.utils.tensorboard.SummaryWriter`` or anything else with
        ``add_scalar(tag, value, step)``, else TypeError. In distributed training give one to
        the first process alone.
        """
        log_scalars(self.report(), writer, step)

    def _snapshot(self) -> Snapshot:
        return take_snapshot(self.bound.plan, self.bound.settled_state(), self.bound.rules)

    # ---- checkpoints ----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A snapshot on the CPU: plain values and tensors, readable with ``weights_only``.

        With sharded parameters it holds the whole sketch, gathered from all processes, and they
        all have to call it.
        """
        return checkpoint.save(self.bound.plan, self.bound.settled_state(), self.options)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from a snapshot, of whichever backend.

        Raises ValueError, with nothing loaded, if it is of another schema, of other options
        (``backend`` and ``error_if_nonfinite`` may differ), of a model with other layers, or of
        parameters that were sharded in another way, cutting through the sketch's buckets.
        """
        self.rebind()
        bound = self.bound
        state = bound.settled_state()
        bound.epoch = checkpoint.load(state_dict, bound.plan, state, self.options)
        if bound.rules.backward:
            bound.prepare()  # the next backpropagation is amplified before the next step
        bound.written(restored=True)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an Amplifier belongs to one model and is not copied or pickled: store its "
            "state_dict(), make a new Amplifier for the copy and load it with load_state_dict()"
        )
