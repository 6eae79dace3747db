"""Reads the gradients as words for the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import Parameter

from ... import _extension
from ...call import Call, Outcome, Updated
from ...model.gradients import DTYPES, GradientReader
from ...model.plan import Plan
from ...reference.state import State
from .columns import DTYPE_SHIFT

# The kernel's codes for dtypes are their places in DTYPES.
DTYPE_BITS = {dtype: 1 << code for code, dtype in enumerate(DTYPES)}
TAGS = {dtype: code << DTYPE_SHIFT.value for code, dtype in enumerate(DTYPES)}


class KnownGradients:
    """Gradients that the reader looked at closely and accepted.

    Those that come later are not looked at again if they are as these were, but for their
    addresses. The extension, where there is one, has the same in C++ (csrc/gradients.h), and takes
    a tenth of the time.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        gradients: Sequence[Tensor | None],
        tags: Sequence[int],
        frozen_too: bool,
    ) -> None:
        self._parameters, self._tags, self._frozen_too = parameters, tags, frozen_too
        self._known = [
            None if g is None else (g.dtype, g.device, g.shape, g.stride()) for g in gradients
        ]
        self._apart: list[int] = []

    def read(self, only: bytes | None, apart: bool) -> tuple[list[int], list[Tensor]] | None:
        """A word for each parameter, and the gradients there are; None where one is not as it was.

        ``apart``: None, too, where two share memory.
        """
        words: list[int] = []
        gradients: list[Tensor] = []
        for index, (parameter, known) in enumerate(zip(self._parameters, self._known, strict=True)):
            gradient = parameter.grad
            if known is None:
                if gradient is not None and (only is None or only[index]):
                    return None
                words.append(0)
                continue
            if (
                gradient is None
                or not (parameter.requires_grad or self._frozen_too)
                or type(gradient) is not Tensor
                or gradient.layout is not torch.strided
                or (gradient.dtype, gradient.device, gradient.shape, gradient.stride()) != known
                or gradient.is_neg()
                or gradient.is_conj()
                or gradient.is_inference()
            ):
                return None
            gradients.append(gradient)
            tag = self._tags[index]
            words.append(0 if tag < 0 else gradient.data_ptr() | tag)
        if apart and words != self._apart:
            ends = sorted((g.data_ptr(), g.data_ptr() + g.nbytes) for g in gradients if g.numel())
            if any(end > begin for (_, end), (begin, _) in pairwise(ends)):
                return None
            self._apart = words
        return words, gradients


class GradientAddresses:
    """Reads a plan's gradients as words for the kernel: address and dtype, 0 without elements.

    The reader looks at every gradient closely. One that is as it was then, but for its address,
    is not looked at again: that takes far longer than the launch.

    Attributes:
        fresh: whether the reader looked at those that were read last.
    """

    def __init__(self, plan: Plan, state: State, needs_norm: bool) -> None:
        self.plan, self.members, device = plan, state.members, state.device
        self.reader = GradientReader(plan, device, state.members, needs_norm)
        self.device = device
        self.fresh = False
        self.words: list[int] = []
        self._gradients: list[Tensor] = []  # that were read last, until they are written
        self.dtypes = 0  # a bit for each that was ever there
        self._parameters = [slot.parameter for slot in plan.slots]
        self._watched: tuple[Parameter, ...] = plan.watched
        self._only: bytes | None = None
        self._known: KnownGradients | None = None
        self._present: list[bool] = []  # which parameters had a gradient that was read
        self._restored = 0
        # Where there is no layer the step is an optimizer's alone: the reader says what then.
        self._frozen_too = not plan.layers
        self.expect(self._parameters)

    def expect(self, tensors: list[Parameter] | list[Tensor]) -> None:
        """Adds to ``dtypes``."""
        for dtype in {tensor.dtype for tensor in tensors}:
            self.dtypes |= DTYPE_BITS.get(dtype.to_real() if dtype.is_complex else dtype, 0)

    def read(self, call: Call) -> Outcome:
        """Fills ``words``; raises what the reader raises."""
        self.fresh = not self._as_before(call)
        if not self.fresh:
            self.members.again(self.plan)
            return Outcome.DONE
        self._known = None
        flat = self.reader.read(call)
        if isinstance(flat, Outcome):
            return flat
        self.words = [
            0 if g is None or g.numel() == 0 else g.data_ptr() | TAGS[g.dtype] for g in flat
        ]
        self._gradients = [g for g in flat if g is not None]
        self.expect(self._gradients)
        self._learn(call.only, flat)
        return Outcome.DONE

    def updated(self, call: Call) -> list[Updated | None]:
        """What the call's optimizer updates by the gradients that were read last."""
        assert call.update is not None
        if self.fresh:
            return self.reader.updated(call) or []
        gradients = [
            parameter.grad if present else None
            for parameter, present in zip(self._parameters, self._present, strict=True)
        ]
        names = [slot.name for slot in self.plan.slots]
        return call.update.tensors(names, self._parameters, gradients)

    def written(self, call: Call) -> None:
        """Tells torch that the kernel wrote to what was read, and lets go of it.

        An update only reads gradients.
        """
        read, self._gradients = self._gradients, []
        # Which ones were written is known on the device only.
        written = read if call.update is None else []
        torch.autograd.graph.increment_version(
            written if call.found_inf is None else [*written, call.found_inf]
        )
        self.reader.write_back(call)

    def _learn(self, only: bytes | None, flat: list[Tensor | None]) -> None:
        gradients: list[Tensor | None] = []
        tags: list[int] = []
        for parameter, view in zip(self._parameters, flat, strict=True):
            gradient = parameter.grad
            if gradient is not None and gradient.layout != torch.strided:
                return  # the reader takes care of what is sparse
            if view is None or gradient is None:
                gradients.append(None)
                tags.append(-1)
            elif view.data_ptr() == gradient.data_ptr():
                gradients.append(gradient)
                tags.append(TAGS[view.dtype] if view.numel() > 0 else -1)
            else:  # a copy: it is the reader that writes it back
                return
        extension = _extension.load()
        kind = KnownGradients if extension is None else extension.KnownGradients
        self._known = kind(self._parameters, gradients, tags, self._frozen_too)
        self._present = [gradient is not None for gradient in gradients]
        self._only, self._restored = only, self.members.restored

    def _as_before(self, call: Call) -> bool:
        only = call.only
        if self._known is None or only != self._only or self._restored != self.members.restored:
            return False
        if any(parameter.requires_grad for parameter in self._watched):
            return False
        found = self._known.read(only, call.update is None)
        if found is None:
            return False
        self.words, self._gradients = found
        return True
