"""The Amplifier: options, layers, state and backend of one model, and its steps."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import backends, checkpoint, dispatch, reference
from .attach import Attachment, Part, attachments, innermost
from .backends.sharded import ShardedBackend
from .export import ScalarWriter, log_scalars
from .gradients import Outcome, is_finite, state_device
from .history import History
from .layers import find_layers, unwrap
from .options import Options, check_factor
from .placement import BackwardSteps
from .plan import Plan
from .report import Report, Snapshot, make_report, take_snapshot
from .state import State
from .table import render

_OWNERS: weakref.WeakValueDictionary[int, Amplifier] = weakref.WeakValueDictionary()
Mask = Callable[[Plan], bytes | None]


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

    Raises ValueError for options out of range and a model without trainable parameters.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.options = Options.make(options)
        self._model = weakref.ref(unwrap(model))
        self._excluded: frozenset[int] = frozenset()
        self._parts: weakref.WeakSet[Part] = weakref.WeakSet()
        self._owned: list[int] = []
        self._plan = find_layers(unwrap(model), self.options)
        self._backend: backends.Stepping | None = None
        self._state = State(self._plan, self.options.factor, state_device(self._plan))
        self._epoch = -1
        self._needs_epoch = self.options.needs_epochs()
        self._warned_empty = False
        self._history = History()
        self._handle = dispatch.register(self)

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
        self._step(grad_scale, found_inf, unscale, None)

    def _step(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        unscale: bool,
        mask: Mask | None,
    ) -> None:
        if torch.compiler.is_compiling():
            only = None if mask is None else mask(self._plan)
            dispatch.traced_step(self, grad_scale, found_inf, unscale, only)
            return
        if self._needs_epoch:
            raise RuntimeError(
                'schedule unit "epoch" and refresh="epoch" need set_epoch(epoch) to be called '
                "before the first step; fused_amplify cannot wait for that, an Amplifier can"
            )
        if grad_scale is not None or found_inf is not None:
            self._check_scalar("grad_scale", grad_scale)
            self._check_scalar("found_inf", found_inf)
        backend = self._backend or self._ready()
        if self.options.error_if_nonfinite:
            self._raise_if_nonfinite(found_inf, mask)
        only = None if mask is None else mask(self._plan)
        outcome = backend.step(grad_scale, found_inf, unscale, only, False)
        if outcome is Outcome.DONE or (outcome is Outcome.EMPTY and self._warned_empty):
            return
        self._rebind(warn=True)
        only = None if mask is None else mask(self._plan)
        outcome = self._ready().step(grad_scale, found_inf, unscale, only, True)
        unasked = only is not None and 1 not in only  # all of an optimizer's are frozen
        if outcome is Outcome.EMPTY and not unasked and not self._warned_empty:
            self._warned_empty = True
            warnings.warn(
                "no parameter has a gradient: was the amplifier called before backward()?",
                stacklevel=3,
            )

    def prepare(self) -> None:
        """Allocates, uploads and loads kernels without a step, as capture in a graph needs."""
        self._ready()

    def _ready(self) -> backends.Stepping:
        """The backend, made on first use for the device that the gradients are on."""
        if not self._owned:
            self._rebind(warn=False)  # the model may have changed since
            self._own(self._plan)
        if self._backend is None:
            chosen = backends.choose(self.options.backend, self._state.device, self._plan.sharded)
            self._backend = (
                chosen(self._plan, self._state, self.options)
                if self.options.placement == "gradient"
                else BackwardSteps(chosen, self._plan, self._state, self.options, self._model())
            )
        return self._backend

    def _check_scalar(self, name: str, value: object) -> None:
        if value is None:
            return
        if not isinstance(value, Tensor) or value.numel() != 1 or value.dtype != torch.float32:
            raise TypeError(f"{name} must be a tensor of one float32 element, not {value!r}")
        if value.device != self._state.device:
            self._rebind(warn=True)  # the model may have moved
        if value.device != self._state.device:
            raise ValueError(
                f"{name} is on {value.device}, the gradients are on {self._state.device}"
            )

    def _raise_if_nonfinite(self, found_inf: Tensor | None, mask: Mask | None) -> None:
        if found_inf is not None and found_inf.item() != 0:
            return
        only = None if mask is None else mask(self._plan)
        layers = [
            slot.layer
            for index, slot in enumerate(self._plan.slots[: self._plan.measured])
            if (only is None or only[index]) and not is_finite(slot)
        ]
        if isinstance(self._backend, ShardedBackend):
            layers = self._backend.found_anywhere(layers)
        if layers:
            names = dict.fromkeys(self._plan.layers[layer] for layer in layers)
            raise RuntimeError(
                f"non-finite gradients in layer(s) {', '.join(map(repr, names))}; nothing was "
                "written (error_if_nonfinite=True)"
            )

    @property
    def _state(self) -> State:
        """The state, once the last step on sharded gradients has been added up."""
        if isinstance(self._backend, ShardedBackend):
            self._backend.settle()
        return self._held_state

    @_state.setter
    def _state(self, state: State) -> None:
        self._held_state = state

    # ---- the model ------------------------------------------------------------------

    def rebind(self) -> None:
        """Walks the model again: binds new and replaced parameters, lets vanished ones go.

        Layers keep their state by name; new ones start at their first step. This also happens
        by itself when a parameter loses its gradient, and at ``set_epoch``.
        """
        self._rebind(warn=True)

    def _rebind(self, warn: bool) -> None:
        model, plan = self._model(), self._plan
        if model is not None:
            bound = {id(slot.parameter) for slot in plan.slots} if self._owned else ()
            plan = find_layers(model, self.options, self._excluded, bound, check_names=False)
        device = state_device(plan)
        if plan.serves_the_same(self._plan) and device == self._state.device:
            return
        if self._owned:
            self._own(plan)
        standing = set(plan.layers)
        vanished = [name for name in self._plan.layers if name not in standing]
        if vanished and warn:
            warnings.warn(
                f"layer(s) no longer in the model: {', '.join(map(repr, vanished))}; their state "
                "is gone",
                stacklevel=3,
            )
        self._replace(plan, device)

    def _replace(self, plan: Plan, device: torch.device) -> None:
        state = self._state
        if device != state.device or not plan.laid_out_like(self._plan):
            state = State(plan, self.options.factor, device)
            state.inherit(plan, self._state, self._plan)
        self._plan, self._state, self._backend = plan, state, None

    def _own(self, plan: Plan) -> None:
        for slot in plan.slots:
            if _OWNERS.get(id(slot.parameter), self) is not self:
                raise ValueError(
                    f"parameter {slot.name!r} already belongs to another living Amplifier: use "
                    "that one, or let go of it first (an optimizer it is attached to holds it, and "
                    "so does fused_amplify until gradamp_fast.reset(model))"
                )
        for identity in self._owned:
            _OWNERS.pop(identity, None)
        self._owned = [id(slot.parameter) for slot in plan.slots]
        _OWNERS.update(dict.fromkeys(self._owned, self))

    def _exclude(self, parameters: frozenset[int]) -> None:
        """Leaves out parameters, by id, that an attached optimizer does not want amplified."""
        if parameters != self._excluded:
            before, self._excluded = self._excluded, parameters
            try:
                self._rebind(warn=False)
            except ValueError:
                self._excluded = before
                raise

    # ---- control --------------------------------------------------------------------

    @property
    def factor(self) -> Tensor:
        """What selected gradients are multiplied by: fp64 [], on the gradients' device; a copy.

        Assign a number, or a one-element tensor, to change it from the next step on. A tensor
        on another device than the CPU is taken without looking at it: that would synchronise.
        """
        return self._state.scalar("factor").clone()

    @factor.setter
    def factor(self, value: float | Tensor) -> None:
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"factor must have one element, not shape {tuple(value.shape)}")
            if value.device.type == "cpu":
                check_factor(value.item())
            self._state.scalar("factor").copy_(value.detach().reshape(()))
        else:
            check_factor(value)
            self._state.scalar("factor").fill_(value)
        self._follow()

    @property
    def total_norm(self) -> Tensor | None:
        """Global gradient norm of the last step before clipping: fp64 [], on the device.

        None unless ``max_norm`` or ``match_norm`` is set.
        """
        if self.options.max_norm is None and not self.options.match_norm:
            return None
        return self._state.scalar("total_norm").clone()

    def set_epoch(self, epoch: int) -> None:
        """Tells the epoch that begins, counted from 0.

        With ``refresh="epoch"`` a new one brings a decision from the state as it stands, and
        with ``decay=None`` all averages then begin anew.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, Integral) or epoch < 0:
            raise ValueError(f"epoch={epoch!r} is out of range: it must be a whole number >= 0")
        self.rebind()
        state = self._state
        if self._epoch == epoch:
            return
        self._epoch = int(epoch)
        state.scalar("epoch").fill_(self._epoch)
        if self.options.refresh == "epoch":
            reference.decide(state, self.options, state.scalar("epoch"))
            if self.options.decay is None:
                state.restart()
        self._needs_epoch = False
        self._follow()

    def _follow(self) -> None:
        """Backpropagation, if that is what amplifies, goes by the state as it stands."""
        if self.options.placement == "backward" and self._owned:
            backend = self._ready()
            assert isinstance(backend, BackwardSteps)
            backend.refresh()

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Steps by itself before every ``optimizer.step()``, for the optimizer's parameters.

        Closures are honoured: the step follows each of their calls. Groups with
        ``param_group["amplify"] = False`` are left alone. An optimizer that unscales gradients
        itself (``fused=True`` under a GradScaler) is left to do so. Returns a handle whose
        ``remove()`` ends it. Warns for optimizers that a constant factor does not move.

        The optimizer keeps the amplifier alive; a copy of it made by ``copy.deepcopy`` has no
        hook, so attach to that anew. One inside a wrapper such as Accelerate's is attached to
        itself.

        Raises ValueError if the optimizer holds none of the model's parameters, or is attached
        already, TypeError if it is none, or calls no hooks.
        """
        return Attachment(self, innermost(optimizer))

    @property
    def attached(self) -> bool:
        """Whether an optimizer calls ``step`` by itself."""
        return bool(attachments(self))

    def reset(self) -> None:
        """Back to before the first step, in place: no epoch is set, ``factor`` is the option's.

        The history is empty again. Options and attachments stay; ``gradamp_fast.reset(model)``
        is for other options.
        """
        self._state.reset()
        if isinstance(self._backend, BackwardSteps):
            self._backend.resume()
        self._history.clear()
        self._epoch = -1
        self._needs_epoch = self.options.needs_epochs()

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
        return take_snapshot(self._plan, self._state, self.options)

    # ---- checkpoints ----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A snapshot on the CPU: plain values and tensors, readable with ``weights_only``.

        With sharded parameters it holds the whole sketch, gathered from all processes, and they
        all have to call it.
        """
        return checkpoint.save(self._plan, self._state, self.options)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from a snapshot, of whichever backend.

        Raises ValueError, with nothing loaded, if it is of another schema, of other options
        (``backend`` and ``error_if_nonfinite`` may differ), of a model with other layers, or of
        parameters that were sharded in another way, cutting through the sketch's buckets.
        """
        self.rebind()
        self._epoch = checkpoint.load(state_dict, self._plan, self._state, self.options)
        self._needs_epoch = self.options.needs_epochs() and self._epoch < 0
        if self.options.placement == "backward":
            backend = self._ready()
            assert isinstance(backend, BackwardSteps)
            backend.resume()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an Amplifier belongs to one model and is not copied or pickled: store its "
            "state_dict(), make a new Amplifier for the copy and load it with load_state_dict()"
        )
