"""Controls that an experiment on amplification needs and a user of it does not.

`measure="random"` chooses any layers. `Shuffled` asks a sharper question: is it *these* layers, or
would as many others of the same types have done as well? `Dosed` compares measures at equal doses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradamp_fast import Amplifier, reference
from gradamp_fast.model.walk import unwrap

SLACK = 1 / 20


def make(model: nn.Module, options: Mapping[str, Any]) -> Amplifier:
    """An Amplifier; with an option `shuffle`, which is a seed >= 0, a `Shuffled` one.

    With `dose`, a share of all elements, it is a `Dosed` one. `one_factor=True` makes the whole
    model one layer.
    """
    given = dict(options)
    if given.pop("one_factor", False):
        given["group_by"] = lambda name: "model"
    if "dose" in given:
        return Dosed(model, given.pop("dose"), **given)
    seed = given.pop("shuffle", None)
    return Amplifier(model, **given) if seed is None else Shuffled(model, seed, **given)


class _Rechosen(Amplifier):
    """Replaces what each decision chose, for the steps after it.

    A report's `changed_at` is that of the choice. Steps are those of `step()`: what `attach` does
    is left as it was chosen. Raises ValueError for `timing="exact"`, where the step that decides
    would multiply by the choice itself, and for `group_by` other than "module".
    """

    def __init__(self, model: nn.Module, control: str, **options: Any) -> None:
        super().__init__(model, **options)
        if self.options.timing != "lagged" or self.options.group_by != "module":
            raise ValueError(f'{control} goes with timing="lagged" and group_by="module" only')

    def step(self, *args: Any, **kwargs: Any) -> None:
        """As `Amplifier.step`; then, if it decided, other layers are taken for the steps after."""
        before = self._counted()
        super().step(*args, **kwargs)
        if self.options.refresh != "epoch":
            after = self._counted()
            self._replace((after != before) & (after % self.options.refresh == 0))

    def set_epoch(self, epoch: int) -> None:
        """As `Amplifier.set_epoch`, with what it chose replaced."""
        new = epoch != self.bound.epoch
        super().set_epoch(epoch)
        if new and self.options.refresh == "epoch":
            self._replace(None)

    def _counted(self) -> Tensor:
        state = self.bound.settled_state()
        return state.scalar("step") - state.scalar("skipped_steps")

    def _replace(self, due: Tensor | None) -> None:
        selected = self.bound.settled_state().column("selected")
        other = self._chosen_instead(selected)
        selected.copy_(other if due is None else torch.where(due, other, selected))
        self.bound.written()

    def _chosen_instead(self, selected: Tensor) -> Tensor:
        """What the last decision is taken to have chosen: 0 or 1, fp64 [layers]."""
        raise NotImplementedError


class Shuffled(_Rechosen):
    """Selects, after each decision, as many layers of each type as were chosen, but any.

    A layer's type is the class of the module that it is. What is drawn depends on the seed, the
    decision's number and the layer's position alone, and nothing leaves the device.
    """

    def __init__(self, model: nn.Module, shuffle: int, **options: Any) -> None:
        super().__init__(model, "shuffle", **options)
        self._seed = shuffle
        modules = [unwrap(model).get_submodule(name) for name in self.bound.plan.layers]
        kinds = list(dict.fromkeys(map(type, modules)))
        self._kind = torch.tensor(
            [kinds.index(type(module)) for module in modules],
            dtype=torch.float64,
            device=self.bound.device,
        )

    def _chosen_instead(self, selected: Tensor) -> Tensor:
        decision = reference.last_decision(self.bound.settled_state(), self.bound.rules)
        draws = reference.draws(len(self._kind), self._seed, decision)
        return torch.empty_like(selected).scatter_(
            0, (self._kind + draws).argsort(), selected[self._kind.argsort(stable=True)]
        )


class Dosed(_Rechosen):
    """Selects by score until a share of all elements is: an equal dose, whatever the layers' sizes.

    From the lowest score (the highest with `select="above"`) on, every layer is taken that still
    fits, up to a twentieth over the dose: large layers would else leave gaps. The threshold is of
    no account. Decisions wait for the device.
    """

    def __init__(self, model: nn.Module, dose: float, **options: Any) -> None:
        super().__init__(model, "dose", **options)
        self._dose = dose

    def _chosen_instead(self, selected: Tensor) -> Tensor:
        state, rules = self.bound.settled_state(), self.bound.rules
        decision = reference.last_decision(state, rules)
        scores = reference.chosen_scores(state, rules, decision)
        eligible = (state.column("steps") >= rules.min_steps) & scores.isfinite()
        numel = self.bound.plan.layer_numel
        left = (1 + SLACK) * self._dose * sum(numel)
        chosen = torch.zeros(len(numel), dtype=selected.dtype)
        order = scores.argsort(descending=self.options.select == "above").tolist()
        for layer in order:
            if eligible[layer] and numel[layer] <= left:
                chosen[layer] = 1.0
                left -= numel[layer]
        return chosen.to(selected.device)
