"""Two equal models with equal gradients, and what is compared of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from cases import SHAPES, Place, Stream, bare, put, same_bits
from torch import Tensor, nn


def drawn(place: Place, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = bare(SHAPES, dtype, place.device)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(same_bits(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def near(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


class Pair:
    """One model whose optimizer amplifies, one that another way is tried on; equal gradients."""

    def __init__(self, place: Place, dtype: torch.dtype = torch.float64) -> None:
        self.a, self.b = drawn(place, dtype), drawn(place, dtype)
        self.stream = Stream(self.a)

    def give(self) -> dict[str, Tensor]:
        gradients = self.stream.next()
        for model in (self.a, self.b):
            put(model, {name: g.clone() for name, g in gradients.items()})
        return gradients

    def untouched(self, gradients: Mapping[str, Tensor]) -> bool:
        return all(same_bits(p.grad, gradients[n]) for n, p in self.a.named_parameters())
