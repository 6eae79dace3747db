"""The compiled extension: C++ on the CPU, on torch's threads, and CUDA C++ in one launch a step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _extension, reference
from ..call import Call, Outcome, Updated, Updates
from ..model.gradients import GradientReader
from ..model.plan import Plan
from ..options import Rules
from ..reference.state import ENUMS, GLOBAL_FIELDS, LAYER_FIELDS, State
from .stepping import Measuring

_MEMBERS, _STATELESS = 5, 6  # Outcome::kMembers and kStateless in csrc/stepper.h
# The extension's own lists, which have to be the same.
LISTS = {
    "GLOBAL_FIELDS": GLOBAL_FIELDS,
    "LAYER_FIELDS": LAYER_FIELDS,
    "ENUMS": ENUMS,
    "GROWTH": (reference.LOW, reference.SURGE, reference.EARLY),
}


class CompiledBackend(Measuring):
    """Hands the parameters to the extension, which reads their gradients itself."""

    def __init__(self, plan: Plan, state: State, rules: Rules) -> None:
        extension = _extension.load()
        assert extension is not None, _extension.reason()
        _extension.check_lists(extension, LISTS)
        self.plan, self.state = plan, state
        self.reader = GradientReader(plan, state.device, state.members, rules.needs_norm)
        self.compiled = extension.Stepper(
            parameters=[slot.parameter for slot in plan.slots],
            watched=list(plan.watched),
            tensors=[
                (s.layer, s.numel, s.bucket_log2, s.first_bucket, s.first_word) for s in plan.slots
            ],
            num_layers=len(plan.layers),
            options=for_kernel(rules),
            values=state.values,
            sketch=state.sketch,
            parity=state.parity,
            members=state.members.flags,
            lacking=state.members.lacking,
        )
        # Of each optimizer: which slots it updates, as of which version of its groups.
        self._updaters: weakref.WeakKeyDictionary[Updates, tuple[int, Any]] = (
            weakref.WeakKeyDictionary()
        )

    def step(self, call: Call) -> Outcome:
        updates = call.update
        given = call if updates is None else call._replace(update=self._updater(updates))
        outcome = self.compiled.step(*given)  # in the order of its fields
        if outcome == _STATELESS:
            assert updates is not None
            updates.make_state()
            outcome = self.compiled.step(*given)
        if outcome == 0:  # what nearly every step comes to, without a look at the enumeration
            return Outcome.DONE
        if outcome <= Outcome.MISSING:
            return Outcome(outcome)
        # Something is unusual: look closer, and raise, rebind, or go on with what was copied.
        gradients = self.reader.read(call)
        if isinstance(gradients, Outcome):
            return gradients
        updated = None if outcome == _MEMBERS else self.reader.updated(call)
        self.state.heed_members(self.plan)
        if outcome == _MEMBERS:
            return Outcome(self.compiled.step(*given, members_known=True))
        self._step_gradients(gradients, call, None, updated)
        self.reader.write_back(call)
        return Outcome.DONE

    def _updater(self, updates: Updates) -> Any:
        """The extension's side of the updates, ready for a step."""
        updates.look()
        version, updater = self._updaters.get(updates, (0, None))
        if version != updates.version:
            groups = updates.groups(slot.parameter for slot in self.plan.slots)
            updater = _extension.load().Updater(groups)  # type: ignore[union-attr]
            self._updaters[updates] = updates.version, updater
        updater.begin(updates.state, updates.counts, updates.hypers())
        return updater

    def settle(self) -> None:
        # What is read next on the current stream waits for a step on another one.
        self.compiled.settle()

    def follow(self, restored: bool = False) -> None:
        self.compiled.written()

    def measure(
        self,
        gradients: Sequence[Tensor | None],
        call: Call,
        sums: Tensor,
        updated: Sequence[Updated | None] | None = None,
    ) -> None:
        self._step_gradients(gradients, call, sums, updated)

    def _step_gradients(
        self,
        gradients: Sequence[Tensor | None],
        call: Call,
        sums: Tensor | None,
        updated: Sequence[Updated | None] | None,
    ) -> None:
        updater, given = None, []
        if updated is not None:
            assert call.update is not None
            updater = self._updater(call.update)
            given = [of and (of.parameter, of.states, of.steps) for of in updated]
        self.compiled.step_gradients(
            gradients, call.grad_scale, call.found_inf, call.unscale, call.begins_round,
            call.decides, sums, updater, given,
        )  # fmt: skip


class CpuBackend(CompiledBackend):
    """The compiled step for gradients on the CPU."""

    name: ClassVar[str] = "cpu"

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        if device.type != "cpu":
            return "the cpu backend serves gradients on the CPU"
        return _extension.reason()


class CudaBackend(CompiledBackend):
    """The compiled step for gradients on an NVIDIA GPU."""

    name: ClassVar[str] = "cuda"

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.hip:
            return "the cuda backend serves gradients on an NVIDIA GPU"
        if reason := _extension.reason():
            return reason
        built = _extension.built_with()
        if not built.get("cuda"):
            return (
                "the extension was built without CUDA kernels: install nvcc and rebuild with "
                f"GRADAMP_CUDA=1 ({built.get('summary', '')})"
            )
        extension = _extension.load()
        assert extension is not None
        problem: str | None = extension.cuda_unavailable(
            -1 if device.index is None else device.index
        )
        return problem


def for_kernel(rules: Rules) -> dict[str, Any]:
    """Rules as numbers; of enumerations, the place in ``ENUMS``."""
    given = vars(rules)
    return {
        **{name: values.index(given[name]) for name, values in ENUMS.items()},
        "threshold_value": rules.threshold_value,
        "exact": rules.exact,
        "match_norm": rules.match_norm,
        "max_norm": rules.max_norm,
        "decay": rules.decay,
        "min_steps": float(rules.min_steps),
        "refresh": float(rules.refresh),
        "seed": rules.seed,
        "grow": rules.grow,
        "max_factor": rules.max_factor,
        "windows": list(rules.windows),
    }
