"""Controls that an experiment on amplification needs and a user of it does not.

`measure="random"` chooses any layers. `Shuffled` asks a sharper question: is it *these* layers, or
would as many others of the same types have done as well?
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradamp_fast import Amplifier, reference
from gradamp_fast.model.walk import unwrap


def make(model: nn.Module, options: Mapping[str, Any]) -> Amplifier:
    """An Amplifier; with an option `shuffle`, which is a seed >= 0, a `Shuffled` one.

    `one_factor=True` makes the whole model one layer.
    """
    given = dict(options)
    if given.pop("one_factor", False):
        given["group_by"] = lambda name: "model"
    seed = given.pop("shuffle", None)
    return Amplifier(model, **given) if seed is None else Shuffled(model, seed, **given)


class Shuffled(Amplifier):
    """Selects, after each decision, as many layers of each type as were chosen, but any.

    A layer's type is the class of the module that it is. What is drawn depends on the seed, the
    decision's number and the layer's position alone, and nothing leaves the device. A report's
    `changed_at` is that of the choice. Steps are those of `step()`: what `attach` does is not
    shuffled.

    Raises ValueError for `timing="exact"`, where the step that decides would multiply by the
    choice itself, and for `group_by` other than "module".
    """

    def __init__(self, model: nn.Module, shuffle: int, **options: Any) -> None:
        super().__init__(model, **options)
        if self.options.timing != "lagged" or self.options.group_by != "module":
            raise ValueError('shuffle goes with timing="lagged" and group_by="module" only')
        self._seed = shuffle
        modules = [unwrap(model).get_submodule(name) for name in self.bound.plan.layers]
        kinds = list(dict.fromkeys(map(type, modules)))
        self._kind = torch.tensor(
            [kinds.index(type(module)) for module in modules],
            dtype=torch.float64,
            device=self.bound.device,
        )

    def step(self, *args: Any, **kwargs: Any) -> None:
        """As `Amplifier.step`; then, if it decided, the choice is shuffled for the steps after."""
        before = self._counted()
        super().step(*args, **kwargs)
        if self.options.refresh != "epoch":
            after = self._counted()
            self._shuffle((after != before) & (after % self.options.refresh == 0))

    def set_epoch(self, epoch: int) -> None:
        """As `Amplifier.set_epoch`, with what it chose shuffled."""
        new = epoch != self.bound.epoch
        super().set_epoch(epoch)
        if new and self.options.refresh == "epoch":
            self._shuffle(None)

    def _counted(self) -> Tensor:
        state = self.bound.settled_state()
        return state.scalar("step") - state.scalar("skipped_steps")

    def _shuffle(self, due: Tensor | None) -> None:
        state = self.bound.settled_state()
        decision = reference.last_decision(state, self.bound.rules)
        draws = reference.draws(len(self._kind), self._seed, decision)
        selected = state.column("selected")
        shuffled = torch.empty_like(selected).scatter_(
            0, (self._kind + draws).argsort(), selected[self._kind.argsort(stable=True)]
        )
        selected.copy_(shuffled if due is None else torch.where(due, shuffled, selected))
        self.bound.written()
