"""Reads what an optimizer updates, in Python, as words for the kernel."""

from __future__ import annotations

import struct
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ...call import Call, Hyper, Updated, Updates
from ...model.plan import Plan
from .addresses import TAGS, GradientAddresses
from .columns import ADAM, AMSGRAD, HYPER, HYPER_FIELDS, SGD, UPDATE_WORDS

_ROW: int = UPDATE_WORDS.value
_MOST_TENSORS: int = HYPER.value - 1  # between the gradient and the group
_NOTHING = (0,) * _ROW
_SGD: int = SGD.value
_ADAM: int = ADAM.value
_AMSGRAD: int = AMSGRAD.value
_SIGN_BIT = -(1 << 63)


class _Known(NamedTuple):
    """Of a slot: tensors that were updated as they were, for they lie as their gradient does."""

    parameter: Parameter
    keys: Sequence[str]
    others: tuple[weakref.ref[Tensor], ...]  # states by those keys, and what counts the updates
    addresses: list[int]
    row: tuple[int, ...]  # behind the gradient


class UpdateRows:
    """Reads an optimizer's tensors as rows of the kernel's table, and behind them its groups.

    The optimizer looks at every tensor closely. One that is the same as then, at the same address,
    is not looked at again: that takes far longer than the launch.
    """

    def __init__(self, plan: Plan) -> None:
        self.rule = 0
        self.words: list[int] = []
        self._parameters = [slot.parameter for slot in plan.slots]
        self._written: list[Tensor] = []
        self._hypers: list[Hyper] = []  # keep learning rates that are tensors until the launch
        self._of: tuple[object, ...] = ()  # the optimizer and its groups, as of what is known
        self._known: list[_Known | None] = []

    def read(self, call: Call, gradients: GradientAddresses) -> None:
        """Fills ``words`` and ``rule``; raises what the optimizer raises."""
        updates = call.update
        assert updates is not None
        updates.look()
        hypers = self._hypers = updates.hypers()
        self.rule = _rule(hypers)
        of = (id(updates), updates.version, *(hyper.states for hyper in hypers))
        if gradients.fresh or self._of != of or not self._as_before(updates, gradients.words):
            self._of = ()
            updated = gradients.updated(call)
            groups = updates.groups(self._parameters)
            if self._look(updates, gradients.words, updated, groups):
                self._of = of
        for hyper in hypers:
            self.words += _numbers(hyper)

    def written(self) -> None:
        """Tells torch that the kernel wrote to what was read, and lets go of it."""
        written, self._written, self._hypers = self._written, [], []
        torch.autograd.graph.increment_version(t for t in written if not t.is_inference())

    def _look(
        self,
        updates: Updates,
        words: Sequence[int],
        updated: Sequence[Updated | None],
        groups: Sequence[int],
    ) -> bool:
        """Makes rows, and remembers their tensors; False if some of them is a copy."""
        self.words, self._written, self._known = [], [], []
        all_known = True
        for index, (word, of) in enumerate(zip(words, updated, strict=True)):
            if of is None:
                self.words += _NOTHING
                self._known.append(None)
                continue
            given = [of.parameter, *of.states, of.steps]
            addresses = [tensor.data_ptr() for tensor in given]
            gap = [0] * (_MOST_TENSORS - len(given))
            place = len(words) * _ROW + groups[index] * len(HYPER_FIELDS)
            row = (*addresses[:-1], *gap, addresses[-1], place, 0)
            self.words += (word, *row)
            self._written += given
            parameter, keys = self._parameters[index], of.hyper.states
            own = [t for t in _others(updates, parameter, keys) if t is not None]
            all_known &= [t.data_ptr() for t in (parameter, *own)] == addresses
            all_known &= not any(tensor.is_inference() for tensor in given)
            others = tuple(weakref.ref(tensor) for tensor in own)
            self._known.append(_Known(parameter, keys, others, addresses, row))
        return all_known

    def _as_before(self, updates: Updates, words: Sequence[int]) -> bool:
        rows: list[int] = []
        written: list[Tensor] = []
        for word, known in zip(words, self._known, strict=True):
            if known is None:
                rows += _NOTHING
                continue
            addresses = [known.parameter.data_ptr()]
            written.append(known.parameter)
            others = _others(updates, known.parameter, known.keys)
            for tensor, other in zip(others, known.others, strict=True):
                if tensor is None or tensor is not other():
                    return False
                addresses.append(tensor.data_ptr())
                written.append(tensor)
            if addresses != known.addresses:
                return False
            rows.append(word)
            rows += known.row
        self.words, self._written = rows, written
        return True


def _others(updates: Updates, parameter: Parameter, keys: Sequence[str]) -> Iterator[Tensor | None]:
    """A parameter's states, and what counts its updates."""
    state, counts = updates.state.get(parameter, {}), updates.counts
    for key in keys:
        yield state.get(key)
    yield state.get("step") if counts is None else counts.get(parameter)


def _rule(hypers: Sequence[Hyper]) -> int:
    if hypers[0].rule == "sgd":
        return _SGD
    return _AMSGRAD if any(hyper.amsgrad for hyper in hypers) else _ADAM


def _numbers(hyper: Hyper) -> list[int]:
    """A group's words, in the order of ``HYPER_FIELDS``."""
    rate, lr = 0, hyper.lr
    if isinstance(lr, Tensor):
        rate, lr = lr.data_ptr() | TAGS[lr.dtype], 0.0
    numbers = struct.pack("5d", lr, hyper.weight_decay, hyper.beta1, hyper.beta2, hyper.eps)
    flags = (_SIGN_BIT if hyper.maximize else 0, int(hyper.nesterov), int(hyper.decoupled))
    return [rate, *struct.unpack("5q", numbers), *flags]
