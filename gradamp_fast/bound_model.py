"""A model and its optimizers as they stand: what is bound, and when that is looked at again."""

from __future__ import annotations

import contextlib
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import backends
from .call import Call, Outcome
from .model.gradients import GradientReader, state_device
from .model.optimizers import Holding
from .model.plan import Plan
from .model.rounds import Rounds
from .model.walk import Skeleton, find_layers, find_modules, unwrap
from .options import Options
from .reference import end_round, nonfinite_layers
from .reference.state import State

_OWNERS: dict[int, weakref.ref[BoundModel]] = {}  # by the ids of parameters, which they keep alive
_BOUND: weakref.WeakValueDictionary[int, BoundModel] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()
_LOOK_EVERY = 100  # steps at most, where nothing else asks for it
_PARTS_A_STEP = 12  # that are compared on average, so that it takes a microsecond or two
Mask = Callable[[Plan], bytes | None]


def find(handle: int) -> BoundModel | None:
    """The one of that handle, if it lives."""
    return _BOUND.get(handle)


def _disown(parameters: list[int]) -> None:
    """Nobody owns these parameters any more; the list is empty then."""
    for parameter in parameters:
        _OWNERS.pop(parameter, None)
    parameters.clear()


class BoundModel:
    """Parameters, layers, state and backend of one model, which it does not keep alive.

    The model is looked at again (``look_again``)

    - at the first step or ``prepare``, from which on its trainable parameters are owned;
    - when a step finds a parameter that was unfrozen, moved or changed size;
    - when its modules or parameters are others than before. That is compared after a step that
      found no gradient; when one is missing, ever more rarely where that is the rule; and else
      after as many steps as take little time beside it, at most a hundred;
    - when the loss scale is on another device than the gradients were;
    - when an optimizer joins, holds other parameters, or changes its mind about what it wants
      amplified;
    - when somebody asks: ``Amplifier.rebind``, ``set_epoch`` and ``load_state_dict`` do.

    Attributes:
        rules: what steps go by.
        plan: the parameters and layers that are bound now.
        epoch: as it was told last; -1: never.
        holdings: what is known of the optimizers that hold the parameters.
        handle: a number that names this in a compiled graph for as long as it lives.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.rules = options.rules()
        self.plan = find_layers(unwrap(model), options)
        self.epoch = -1
        self.holdings: weakref.WeakSet[Holding] = weakref.WeakSet()
        self.handle = next(_HANDLES)
        self._options = options
        # The callback holds nothing: what it is a method of may be gone before the model.
        forget = weakref.WeakMethod(self._forget)
        self._model = weakref.ref(unwrap(model), lambda _: (call := forget()) and call())
        self._state = State(self.plan, options.factor, state_device(self.plan))
        self._backend: backends.Stepping | None = None
        self._excluded: frozenset[int] = frozenset()
        self._shares: dict[int, int] = {}
        self._rounds = Rounds(once=self.rules.grow)
        self._owned: list[int] = []
        self._skeleton: Skeleton | None = None
        self._unlooked = 0  # steps since the model was compared
        self._period = _LOOK_EVERY  # after so many it is compared anyway
        self._patience = 1  # such steps until a gradient that is missing is a reason to compare
        self._warned_empty = False
        self._rising: bool | None = None  # as it stands in the state; None: not known
        self._risers: weakref.WeakSet[Holding] = weakref.WeakSet()
        self._suspensions = 0
        self._any_on_update = False
        _BOUND[self.handle] = self
        weakref.finalize(self, _disown, self._owned).atexit = False

    @property
    def model(self) -> nn.Module | None:
        """The model without wrappers, for as long as it lives."""
        return self._model()

    @property
    def device(self) -> torch.device:
        """Where the state is, and where gradients are expected."""
        return self._state.device

    # ---- steps ----------------------------------------------------------------------

    def step(self, call: Call, holding: Holding | None = None, mask: Mask | None = None) -> None:
        """One step, of an optimizer's part if there is a holding, else of the whole model.

        ``mask`` gives ``Call.only`` for whichever plan is bound when it is taken, if that is not
        what the optimizer holds. Raises RuntimeError, TypeError and ValueError as
        ``Amplifier.step`` says.
        """
        if self.epoch < 0 and self.rules.needs_epochs:
            raise RuntimeError(
                'schedule unit "epoch" and refresh="epoch" need set_epoch(epoch) to be called '
                "before the first step; fused_amplify cannot wait for that, an Amplifier can"
            )
        if call.grad_scale is not None or call.found_inf is not None:
            self._check_scalar("grad_scale", call.grad_scale)
            self._check_scalar("found_inf", call.found_inf)
        if holding is not None and self.rules.grow:
            self._watch_rates(holding)
        self._unlooked += 1
        if self._unlooked >= self._period:
            self._patience = 1
            self._look_if_changed()
        backend = self._backend or self.prepare()
        if mask is None and holding is not None:
            mask = holding.only
        if mask is not None:
            call = call._replace(only=mask(self.plan))
        call = self._rounds.place(call, holding, self.holdings)
        if call.begins_round and self._rounds.undecided:
            self._end_round()
        if self.rules.exact and not self.rules.grow:
            call = call._replace(decides=True)  # by what it measured itself
        outcome = self._step(backend, call, mask)
        self._rounds.made(call, holding, empty=outcome is Outcome.EMPTY)

    def _step(self, backend: backends.Stepping, call: Call, mask: Mask | None) -> Outcome:
        self._raise_if_nonfinite(backend, call)
        outcome = backend.step(call)
        if outcome is not Outcome.DONE:
            outcome = self._step_again(outcome, call, mask)
        return outcome

    def _step_again(self, outcome: Outcome, call: Call, mask: Mask | None) -> Outcome:
        """After a step that came to nothing, with a closer look at the model."""
        if outcome is Outcome.MISSING:
            if self._unlooked >= self._patience:
                self._patience = 1 if self._look_if_changed() else 2 * self._patience
        elif outcome is Outcome.REBIND or not self._warned_empty:
            self.look_again()
        only = None if mask is None else mask(self.plan)
        call, backend = call._replace(only=only, walked=True), self.prepare()
        self._raise_if_nonfinite(backend, call)
        outcome = backend.step(call)
        if outcome is not Outcome.EMPTY:
            return outcome
        self._unlooked = _LOOK_EVERY
        unasked = only is not None and 1 not in only  # all of an optimizer's are frozen
        if not unasked and not self._warned_empty:
            self._warned_empty = True
            warnings.warn(
                "no parameter has a gradient: was the amplifier called before backward()?",
                stacklevel=5,
            )
        return outcome

    def _end_round(self) -> None:
        """Decides, where that is due, for a round in which not every optimizer stepped."""
        end_round(self.settled_state(), self.rules)
        self._rounds.undecided = False
        self.written()

    def prepare(self) -> backends.Stepping:
        """The backend, made on first use for the device that the gradients are on."""
        if self.model is None:
            raise RuntimeError("the amplifier's model is gone: keep a reference to the model")
        if not self._owned:
            self.look_again(warn=False)  # the model may have changed since
            self._own(self.plan)
        if self._backend is None:
            with torch.inference_mode(False):  # what it makes is written outside, too
                self._backend = backends.make(
                    self._options.backend, self.plan, self._state, self.rules, self.model
                )
            self._backend.suspended = self._suspensions > 0
        return self._backend

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Gradients that are computed meanwhile are left alone."""
        self._suspend(1)
        try:
            yield
        finally:
            self._suspend(-1)

    def _suspend(self, by: int) -> None:
        self._suspensions += by
        if self._backend is not None:
            self._backend.suspended = self._suspensions > 0

    def _check_scalar(self, name: str, value: object) -> None:
        if value is None:
            return
        if not isinstance(value, Tensor) or value.numel() != 1 or value.dtype != torch.float32:
            raise TypeError(f"{name} must be a tensor of one float32 element, not {value!r}")
        if value.device != self.device:
            self.look_again()  # the model may have moved
        if value.device != self.device:
            raise ValueError(f"{name} is on {value.device}, the gradients are on {self.device}")

    def _raise_if_nonfinite(self, backend: backends.Stepping, call: Call) -> None:
        if not self._options.error_if_nonfinite or (
            call.found_inf is not None and call.found_inf.item() != 0
        ):
            return
        gradients = GradientReader(self.plan, self.device).read(call)
        layers: Sequence[int] = ()  # none where the step looks at the model first
        if not isinstance(gradients, Outcome):
            state = self.settled_state()
            layers = nonfinite_layers(self.plan, state, self.rules, gradients, call)
        if layers := backend.found_anywhere(layers):
            names = dict.fromkeys(self.plan.layers[layer] for layer in layers)
            raise RuntimeError(
                f"non-finite gradients in layer(s) {', '.join(map(repr, names))}; nothing was "
                "written (error_if_nonfinite=True)"
            )

    def _forget(self) -> None:
        """The model is gone: its parameters are let go, what was measured can still be read."""
        self.settled_state()
        self._backend = None
        for holding in self.holdings:
            holding.let_go()
        _disown(self._owned)
        self.plan = self.plan.without_parameters()

    # ---- the state ------------------------------------------------------------------

    def settled_state(self) -> State:
        """The state, once the last step on sharded gradients is added up: may be a collective.

        In code that is being compiled it is named only; the operator in the graph settles it.
        """
        if self._backend is not None and not torch.compiler.is_compiling():
            self._backend.settle()
        return self._state

    def written(self, restored: bool = False) -> None:
        """Has to be called after anything but a step wrote to the state.

        ``restored``: all of it, the counters included.
        """
        if restored:
            self._rising = None
        if self._backend is not None:
            self._backend.follow(restored)

    # ---- the model ------------------------------------------------------------------

    def look_again(self, warn: bool = True) -> None:
        """Walks the model: binds new and replaced parameters, lets vanished ones go.

        Layers keep their state by name. ``warn``: of layers that vanish with theirs. Raises
        ValueError, with everything as it was, as ``find_layers`` does, and for a parameter that
        another one owns. With sharded parameters a collective.
        """
        model = self.model
        if model is None:
            return
        bound = {id(slot.parameter) for slot in self.plan.slots} if self._owned else ()
        modules = find_modules(model)
        plan = find_layers(
            model,
            self._options,
            self._excluded,
            bound,
            self._shares,
            check_names=False,
            modules=modules,
        )
        self._skeleton = Skeleton(modules)
        self._period = min(_LOOK_EVERY, 1 + self._skeleton.parts // _PARTS_A_STEP)
        self._unlooked = 0
        device = state_device(plan)
        state = self.settled_state()  # whether anything changed or not, as all processes do it
        if plan.serves_the_same(self.plan) and device == state.device:
            return
        if self._owned:
            self._own(plan)
        standing = set(plan.layers)
        vanished = [name for name in self.plan.layers if name not in standing]
        if vanished and warn:
            warnings.warn(
                f"layer(s) no longer in the model: {', '.join(map(repr, vanished))}; their state "
                "is gone",
                stacklevel=3,
            )
        self._replace(plan, device)

    def _look_if_changed(self) -> bool:
        """Looks again if modules or parameters are others than before; whether it did."""
        self._unlooked = 0
        changed = self._skeleton is not None and not self._skeleton.stands()
        if changed:
            self.look_again()
        return changed

    def _replace(self, plan: Plan, device: torch.device) -> None:
        state = self._state
        if device != state.device or not plan.laid_out_like(self.plan):
            state = State(plan, self._options.factor, device)
            state.inherit(plan, self._state, self.plan)
        hooked = self._backend is not None and self._backend.acts_between_steps
        self.plan, self._state, self._backend = plan, state, None
        self._tell_updates()
        if hooked:
            self.prepare()

    def _own(self, plan: Plan) -> None:
        mine = weakref.ref(self)
        for slot in plan.slots:
            owner = _OWNERS.get(id(slot.parameter), mine)
            if owner is not mine and owner() is not None:
                raise ValueError(
                    f"parameter {slot.name!r} already belongs to another living Amplifier: use "
                    "that one, or let go of it first (an optimizer it is attached to holds it, and "
                    "so does fused_amplify until gradamp_fast.reset(model))"
                )
        _disown(self._owned)
        self._owned += (id(slot.parameter) for slot in plan.slots)
        _OWNERS.update(dict.fromkeys(self._owned, mine))

    # ---- its optimizers -------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether an optimizer's steps amplify."""
        return any(holding.attached for holding in self.holdings)

    def attached_to(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer's do."""
        return any(h.attached and h.optimizer is optimizer for h in self.holdings)

    def knows_any_of(self, holding: Holding) -> bool:
        """Whether an optimizer holds a parameter of the model, frozen or not."""
        ours = (*(slot.parameter for slot in self.plan.slots), *self.plan.watched)
        return not holding.parameters.isdisjoint(map(id, ours))

    def meet(self) -> None:
        """Looks again for an optimizer that is about to join: it may hold what is new."""
        self.look_again(warn=bool(self._owned))

    def join(self, holding: Holding) -> None:
        """From here on what the optimizer does not want amplified is left out; all or nothing."""
        self.holdings.add(holding)
        try:
            self._heed_optimizers()
        except ValueError:
            self.holdings.discard(holding)
            raise
        self._tell_updates()

    def leave(self, holding: Holding) -> None:
        """The optimizer's wishes no longer count."""
        self.holdings.discard(holding)
        self._heed_optimizers()
        self._tell_updates()
        if holding in self._risers:
            self._tell_rising(holding, False)

    def _watch_rates(self, holding: Holding) -> None:
        """Before a step: nothing grows in it if the optimizer's learning rate has risen."""
        optimizer = holding.optimizer
        rising = None if optimizer is None else holding.rates.rise(optimizer)
        if rising is not None:
            self._tell_rising(holding, rising)

    def _tell_rising(self, holding: Holding, rising: bool) -> None:
        """Written to the device where it changes what is there."""
        (self._risers.add if rising else self._risers.discard)(holding)
        rises = len(self._risers) > 0
        if rises != self._rising:
            self._rising = rises
            self.settled_state().scalar("rising").fill_(float(rises))

    def follow(self, holding: Holding) -> None:
        """Before an optimizer's step: what came into its groups is bound, if it is the model's."""
        if holding.changed():
            self._heed_optimizers()
            self._look_if_changed()
            self._tell_updates()

    def _tell_updates(self) -> None:
        """Writes to the state of which layers an optimizer's updates are multiplied."""
        held = [h.parameters for h in self.holdings if h.active and h.multiplies_update]
        updated = frozenset[int]().union(*held)
        if not updated and not self._any_on_update:
            return
        self._any_on_update = bool(updated)
        slots = self.plan.slots[: self.plan.measured]
        layers = {slot.layer for slot in slots if id(slot.parameter) in updated}
        self.settled_state().tell_updates([n in layers for n in range(len(self.plan.layers))])
        self.written()

    def _heed_optimizers(self) -> None:
        """Leaves out what they do not want amplified; each one's share of a layer is its own."""
        active = sorted((h for h in self.holdings if h.active), key=lambda h: h.number)
        unwanted = frozenset().union(*(h.unwanted for h in active))
        shares: dict[int, int] = {}
        for holding in active if len(active) > 1 else ():
            for parameter in holding.parameters:
                shares.setdefault(parameter, holding.number)
        if (unwanted, shares) == (self._excluded, self._shares):
            return
        before = self._excluded, self._shares
        self._excluded, self._shares = unwanted, shares
        try:
            self.look_again(warn=False)
        except ValueError:
            self._excluded, self._shares = before
            raise
