"""Gradients that need no second look: in Python and in C++, which have to agree."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from gradamp_fast import _extension

addresses = pytest.importorskip("gradamp_fast.backends.triton.addresses")


class Subclass(Tensor):
    pass


@pytest.fixture(params=["python", "c++"])
def kind(request: pytest.FixtureRequest) -> Any:
    if request.param == "python":
        return addresses.KnownGradients
    extension = _extension.load()
    if extension is None:
        pytest.skip(str(_extension.reason()))
    return extension.KnownGradients


def parameters() -> list[Parameter]:
    """With gradients: plain, transposed, complex, none, empty."""
    found = [
        Parameter(torch.zeros(3, 4)),
        Parameter(torch.zeros(3, 4)),
        Parameter(torch.zeros(5, dtype=torch.complex64)),
        Parameter(torch.zeros(2)),
        Parameter(torch.zeros(0)),
    ]
    found[0].grad = torch.zeros(3, 4)
    found[1].grad = torch.zeros(4, 3).t()
    found[2].grad = torch.zeros(5, dtype=torch.complex64)
    found[4].grad = torch.zeros(0)
    return found


TAGS = [1 << 62, 2 << 60, 0, -1, -1]


def know(kind: Any, of: list[Parameter], frozen_too: bool = False) -> Any:
    return kind(of, [parameter.grad for parameter in of], TAGS, frozen_too)


def test_words_and_gradients(kind: Any) -> None:
    of = parameters()
    known = know(kind, of)
    for _ in range(2):  # once with other addresses than those that were seen before
        for apart in (True, True, False):
            words, gradients = known.read(None, apart)
            assert words == [
                of[0].grad.data_ptr() | 1 << 62,
                of[1].grad.data_ptr() | 2 << 60,
                of[2].grad.data_ptr(),
                0,
                0,
            ]
            expected = [p.grad for p in of if p.grad is not None]
            assert all(a is b for a, b in zip(gradients, expected, strict=True))
        for parameter in of:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone(memory_format=torch.preserve_format)


def inference(gradient: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.zeros_like(gradient)


CHANGES: dict[str, tuple[int, Callable[[Tensor], Tensor | None]]] = {
    "missing": (0, lambda g: None),
    "strides": (1, lambda g: g.contiguous()),
    "subclass": (0, lambda g: g.as_subclass(Subclass)),
    "sparse": (0, lambda g: g.to_sparse()),
    "inference": (0, inference),
    "conjugated": (2, lambda g: g.clone().conj()),
    "negative": (1, lambda g: torch._neg_view(g.clone(memory_format=torch.preserve_format))),
    "missing, without elements": (4, lambda g: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_gradient(kind: Any, change: str) -> None:
    of = parameters()
    known = know(kind, of)
    index, changed = CHANGES[change]
    of[index].grad = changed(of[index].grad)
    assert known.read(None, True) is None


@pytest.mark.parametrize("other", [torch.zeros(4, 3), torch.zeros(3, 4, dtype=torch.float64)])
def test_a_gradient_of_another_shape_or_dtype(kind: Any, other: Tensor) -> None:
    of = parameters()
    known = know(kind, of)
    of[0].grad = None
    of[0].data = torch.zeros_like(other)
    of[0].grad = other
    assert known.read(None, True) is None


def test_a_gradient_where_there_was_none(kind: Any) -> None:
    """Unless it is left out."""
    of = parameters()
    known = know(kind, of)
    of[3].grad = torch.zeros(2)
    assert known.read(None, True) is None
    assert known.read(b"\1\1\1\1\1", True) is None
    assert known.read(b"\1\1\1\0\1", True)[0][3] == 0


@pytest.mark.parametrize("frozen_too", [False, True])
def test_frozen(kind: Any, frozen_too: bool) -> None:
    of = parameters()
    known = know(kind, of, frozen_too)
    of[1].requires_grad_(False)
    assert (known.read(None, True) is not None) is frozen_too


def test_shared_memory(kind: Any) -> None:
    """Seen again after it was seen once, and no matter where nothing is multiplied."""
    of = parameters()
    known = know(kind, of)
    assert known.read(None, True) is not None
    memory = torch.zeros(24)
    of[0].grad, of[1].grad = memory[:12].view(3, 4), memory[11:23].view(4, 3).t()
    for _ in range(2):
        assert known.read(None, True) is None
    assert known.read(None, False) is not None
    of[1].grad = memory[12:].view(4, 3).t()
    assert known.read(None, True) is not None


def test_gradients_are_not_kept_alive(kind: Any) -> None:
    of = parameters()
    known = know(kind, of)
    known.read(None, True)
    gradient = weakref.ref(of[0].grad)
    of[0].grad = None
    assert gradient() is None
