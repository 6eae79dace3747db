"""What one step is given, and what comes of it."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor
from torch.nn import Parameter

UpdateRule = Literal["sgd", "adam"]


class Hyper(NamedTuple):
    """Hyper-parameters of one parameter group, by torch's names but for SGD's.

    Attributes:
        beta1: with ``rule="sgd"`` the momentum.
        beta2: with ``rule="sgd"`` the dampening.
        decoupled: whether the decay acts on the parameter, not on the gradient.
    """

    rule: UpdateRule
    lr: float | Tensor
    weight_decay: float
    beta1: float
    beta2: float
    eps: float = 0.0
    maximize: bool = False
    nesterov: bool = False
    amsgrad: bool = False
    decoupled: bool = False

    @property
    def states(self) -> Sequence[str]:
        """Keys of the optimizer's state of a parameter, in the order that kernels have them in."""
        if self.rule == "sgd":
            return ("momentum_buffer",) if self.beta1 else ()
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if self.amsgrad else 2]


class Updated(NamedTuple):
    """A tensor to update: flat real views of n elements, in the memory order of its gradient.

    Attributes:
        states: as ``Hyper.states`` names them, in the parameter's dtype.
        steps: updates before this one: fp32 [].
    """

    hyper: Hyper
    parameter: Tensor
    states: tuple[Tensor, ...]
    steps: Tensor


class Updates(Protocol):
    """An optimizer's updates, which a step makes.

    Attributes:
        version: another one whenever the optimizer holds other parameters, or in other groups.
        counts: by parameter, what counts its updates; None if the state has it as "step".
    """

    version: int
    counts: dict[Parameter, Tensor] | None

    @property
    def state(self) -> dict[Any, Any]:
        """The optimizer's, by parameter."""

    def hypers(self) -> list[Hyper]:
        """Of each group, as it stands."""

    def groups(self, parameters: Iterable[Parameter]) -> list[int]:
        """The group of each; -1 for one that the optimizer does not hold."""

    def look(self) -> None:
        """Follows what became of the optimizer's groups."""

    def make_state(self) -> None:
        """Makes what parameters with a gradient lack of state, and moves what is elsewhere."""

    def tensors(
        self, names: Sequence[str], parameters: Sequence[Parameter], dense: Sequence[Tensor | None]
    ) -> list[Updated | None]:
        """What is updated by each gradient, in the order of its elements.

        ``dense``: gradients whose elements fill a stretch of memory each. What lies in another
        way is copied; ``write_back`` stores what became of it. Raises TypeError or ValueError,
        naming the parameter.
        """

    def write_back(self) -> None:
        """Stores the copies' contents in what they were made of."""


class Call(NamedTuple):
    """What one step is given.

    Attributes:
        grad_scale: what the loss was multiplied by: one fp32 element on the gradients' device.
        found_inf: one fp32 element there; not 0 skips the step, which sets it to 1 itself where
            it finds a gradient that is not finite.
        unscale: whether gradients are divided by ``grad_scale``, too; else an optimizer does it.
        only: a byte for each slot of the plan, 0 for one that is left out; None leaves none out.
        walked: whether the model is known to be as it is bound, so that a gradient that went
            missing is no news.
        begins_round: whether this is the first call of its round. A step is a round of calls, one
            for each optimizer that is attached.
        decides: whether a decision that is due in this round is taken in this call.
        update: an optimizer's updates, of all parameters that ``only`` leaves in. Gradients are
            then read alone.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    unscale: bool = True
    only: bytes | None = None
    walked: bool = False
    begins_round: bool = True
    decides: bool = True
    update: Updates | None = None


class Outcome(enum.IntEnum):
    """What a backend made of a step."""

    DONE = 0
    EMPTY = 1  # no parameter has a gradient: nothing changed
    REBIND = 2  # the model has changed: walk it, then step again
    MISSING = 3  # a gradient that was there is not, for the model may have changed
