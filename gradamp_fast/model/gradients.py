"""Reads the gradients and judges them: the one place that says what a gradient may be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import Parameter

from ..call import Call, Outcome, Updated
from .members import Members, is_dense
from .plan import Plan, Slot
from .shards import is_dtensor, local, refuse_partial

# Bits of a byte of ``Call.only``: whether the gradient counts of a parameter that is trainable, and
# of one that is frozen.
TRAINABLE, FROZEN = 1, 2
# In the order of DType in csrc/rules/common.h.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class GradientReader:
    """Gradients of a plan's parameters as flat real tensors in memory order.

    Of a DTensor that is the part that is here. ``needs_norm``: every gradient has to count in it.

    Attributes:
        members: where it is noted who had a gradient; None: nowhere.
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        members: Members | None = None,
        needs_norm: bool = False,
    ) -> None:
        self.plan = plan
        self.device = device
        self.members = members
        self._needs_norm = needs_norm
        self._had_gradient = [False] * len(plan.slots)
        self._read: list[Tensor | None] = []  # last: dense gradients, or copies of them
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._sparse: list[Tensor] = []
        self._apart: list[int] = []  # addresses of gradients that were seen to share no memory

    def read(self, call: Call) -> list[Tensor | None] | Outcome:
        """A flat view for each slot, None where there is no gradient.

        One that ``call.only`` leaves out is as if without gradient. A gradient that is strided
        without being dense, or lazily conjugated, is copied; ``write_back`` stores what became of
        it. A sparse one, which only an excluded parameter may have, counts as absent; there it is
        unscaled.

        Raises TypeError or ValueError, naming the parameter, before anything is written.
        """
        plan, only, walked = self.plan, call.only, call.walked
        self._copies.clear()
        self._sparse.clear()
        if any(parameter.requires_grad for parameter in plan.watched):
            return Outcome.REBIND
        wanted = [
            only is None
            or (only[i] & TRAINABLE) != 0
            or ((only[i] & FROZEN) != 0 and not slot.parameter.requires_grad)
            for i, slot in enumerate(plan.slots)
        ]
        gradients = [
            _gradient(slot, only is not None and (only[i] & FROZEN) != 0) if wanted[i] else None
            for i, slot in enumerate(plan.slots)
        ]
        for slot, gradient, want, had in zip(
            plan.slots, gradients, wanted, self._had_gradient, strict=True
        ):
            if gradient is None:
                if want and had and not walked:
                    return Outcome.MISSING
            elif gradient.numel() * (2 if gradient.is_complex() else 1) != slot.numel:
                if not walked:
                    return Outcome.REBIND
                raise ValueError(
                    f"the gradient of {slot.name!r} has shape {tuple(gradient.shape)}, the "
                    f"parameter {tuple(slot.parameter.shape)}"
                )
        present = [(s, g) for s, g in zip(plan.slots, gradients, strict=True) if g is not None]
        if not present:
            return Outcome.EMPTY
        for slot, gradient in present:
            _check(slot, gradient, self._needs_norm, call.update is not None)
        if elsewhere := [(s, g) for s, g in present if g.device != self.device]:
            if len(elsewhere) == len(present) and not walked:
                return Outcome.REBIND
            slot, gradient = elsewhere[0]
            raise ValueError(
                f"gradients are on several devices: that of {slot.name!r} is on "
                f"{gradient.device}, others are on {self.device}; use one Amplifier for each "
                "device's part of the model"
            )
        if call.update is None:
            self.refuse_shared_memory(gradients)
        for index, want in enumerate(wanted):
            if want:
                self._had_gradient[index] = gradients[index] is not None
        if self.members is not None:
            self.members.look(plan, gradients, wanted)
        self._read = [None if g is None else self._dense(g) for g in gradients]
        return [None if g is None else _flat(g) for g in self._read]

    def updated(self, call: Call) -> list[Updated | None] | None:
        """What the call's optimizer updates by each gradient that was read; None without one.

        Raises TypeError or ValueError, naming the parameter.
        """
        if call.update is None:
            return None
        slots = self.plan.slots
        return call.update.tensors(
            [slot.name for slot in slots], [slot.parameter for slot in slots], self._read
        )

    def refuse_shared_memory(self, gradients: Sequence[Tensor | None]) -> None:
        """ValueError if two of them do, one for each slot: each would be multiplied twice.

        Looked at only when addresses are not those of the time before.
        """
        owned = [
            (index, gradient)
            for index, gradient in enumerate(gradients)
            if gradient is not None and gradient.layout == torch.strided and gradient.numel() > 0
        ]
        addresses = [gradient.data_ptr() for _, gradient in owned]
        if addresses == self._apart:
            return
        ordered = sorted(zip(addresses, owned, strict=True), key=lambda item: item[0])
        for (start, (index, one)), (other_start, (other_index, other)) in pairwise(ordered):
            if start + _extent(one) > other_start and _share_elements(one, other):
                names = [self.plan.slots[i].name for i in sorted((index, other_index))]
                raise ValueError(
                    f"the gradients of {names[0]!r} and {names[1]!r} share memory, so neither can "
                    "be multiplied alone: give one of them a copy, as p.grad = p.grad.clone()"
                )
        self._apart = addresses

    def _dense(self, gradient: Tensor) -> Tensor | None:
        if gradient.layout != torch.strided:
            self._sparse.append(gradient)
            return None
        gradient = gradient.detach()
        if gradient.is_conj() or gradient.is_neg() or not is_dense(gradient):
            copy = gradient.resolve_conj().resolve_neg().contiguous()
            self._copies.append((gradient, copy))
            gradient = copy
        return gradient

    @torch.no_grad()
    def write_back(self, call: Call) -> None:
        """Stores copies' contents in what they were made of; unscales sparse gradients."""
        if call.update is None:
            for gradient, copy in self._copies:
                gradient.copy_(copy)
        else:
            call.update.write_back()
        self._copies.clear()
        if self._sparse and call.unscale and call.grad_scale is not None:
            inverse = (1 / call.grad_scale.double()).float().reshape(())
            if call.found_inf is not None:
                inverse = torch.where(call.found_inf.reshape(()) == 0, inverse, 1.0)
            for gradient in self._sparse:
                coo = gradient.layout == torch.sparse_coo
                (gradient._values() if coo else gradient.values()).mul_(inverse)
        self._sparse.clear()


def state_device(plan: Plan) -> torch.device:
    """Where the gradients are, or, before there are any, the parameters; the CPU for meta."""
    gradients = (slot.parameter.grad for slot in plan.slots)
    tensor = next((gradient for gradient in gradients if gradient is not None), None)
    device = (plan.slots[0].parameter if tensor is None else tensor).device
    return torch.device("cpu") if device.type == "meta" else device


def _flat(gradient: Tensor) -> Tensor:
    real = torch.view_as_real(gradient) if gradient.is_complex() else gradient
    return real.as_strided((real.numel(),), (1,))


def _gradient(slot: Slot, frozen_too: bool) -> Tensor | None:
    gradient = slot.parameter.grad if slot.parameter.requires_grad or frozen_too else None
    if gradient is None or (slot.shard is None and not is_dtensor(gradient)):
        return gradient
    what = f"the gradient of {slot.name!r}"
    if slot.shard is None:
        raise TypeError(f"{what} is a DTensor, the parameter a plain tensor")
    if not is_dtensor(gradient):
        raise TypeError(f"{what} is a plain tensor, the parameter a DTensor")
    refuse_partial(what, gradient)
    placements, expected = gradient.placements, slot.parameter.placements  # type: ignore[attr-defined]
    if placements != expected:
        raise TypeError(
            f"{what} has placements {placements}, the parameter {expected}: redistribute it to "
            "those before the step"
        )
    return local(gradient)


def _check(slot: Slot, gradient: Tensor, needs_norm: bool, updates: bool) -> None:
    what = f"the gradient of {slot.name!r}"
    if type(gradient) not in (Tensor, Parameter):
        raise TypeError(
            f"{what} is a {type(gradient).__name__}: only plain tensors can be amplified; "
            "exclude the parameter or convert its gradient"
        )
    if gradient.is_inference():
        raise TypeError(
            f"{what} was made under torch.inference_mode and cannot be changed: make it outside, "
            "or assign its clone()"
        )
    if gradient.layout != torch.strided and updates:
        raise TypeError(
            f"{what} has layout {gradient.layout}: a fused optimizer updates by dense gradients "
            "alone; use a module that makes dense ones (such as Embedding(sparse=False)) or give "
            "the parameter to an optimizer of its own"
        )
    if gradient.layout != torch.strided and (slot.layer >= 0 or needs_norm):
        fix = "leave max_norm and match_norm out" if slot.layer < 0 else "exclude it"
        raise TypeError(
            f"{what} has layout {gradient.layout}: only dense gradients can be amplified, or "
            f"counted in a norm; use a module that makes dense ones (such as "
            f"Embedding(sparse=False)) or {fix}"
        )
    real = gradient.dtype.to_real() if gradient.is_complex() else gradient.dtype
    if gradient.is_quantized or real not in DTYPES:
        raise TypeError(
            f"{what} has dtype {gradient.dtype}: float32, bfloat16, float16, float64 and complex "
            "numbers of these can be amplified"
        )
    if gradient.device.type == "meta":
        raise TypeError(f"{what} is on the meta device: it has no elements")
    if gradient.layout == torch.strided and not is_dense(gradient) and _overlaps(gradient):
        raise ValueError(
            f"{what} is expanded or overlaps itself: its elements share memory, so none can be "
            "multiplied alone; call .contiguous() on it"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory; True where that is hard to tell."""
    end = 1
    for stride, size in sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size != 1
    ):
        if stride < end:
            return True
        end = stride * (size - 1) + end
    return False


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether some element of one lies in the other; their stretches of memory overlap."""
    if is_dense(a) and is_dense(b):
        return True
    return bool(torch.isin(_element_addresses(a), _element_addresses(b)).any())


def _element_addresses(tensor: Tensor) -> Tensor:
    places = torch.tensor([tensor.data_ptr()], device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = torch.arange(size, device="cpu") * (stride * tensor.element_size())
        places = (places[:, None] + steps).flatten()
    return places
