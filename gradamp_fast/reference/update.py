"""What an optimizer does with a tensor once its multiplier is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import Hyper, Updated


@torch.no_grad()
def update(
    of: Updated, gradient: Tensor, multiplier: Tensor, inverse: Tensor, counted: Tensor
) -> None:
    """Updates one tensor, its states and its count, where ``counted`` (bool []) is true.

    ``gradient`` is read only. ``multiplier``: the layer's, fp64 []; ``inverse``: of the gradients'
    scale, 1 where they are not scaled. Computed in fp64 and rounded once, to the parameter's
    dtype, but for the product of gradient and multiplier: that is rounded before, to the precision
    in which gradients are multiplied, so that SGD equals SGD on gradients multiplied before.
    """
    rule = _sgd if of.hyper.rule == "sgd" else _adam
    old = (of.parameter, *of.states)
    new = rule(of, gradient, multiplier, inverse)
    for tensor, value in zip(old, new, strict=True):
        tensor.copy_(torch.where(counted, value.to(tensor.dtype), tensor))
    of.steps.add_(counted.to(of.steps.dtype))


def _sgd(of: Updated, gradient: Tensor, multiplier: Tensor, inverse: Tensor) -> Sequence[Tensor]:
    h, p, lr = of.hyper, of.parameter.double(), _rate(of.hyper)
    g = _multiplied(gradient, inverse * multiplier, h)
    g = g + h.weight_decay * p
    if not h.beta1:
        return (p - lr * g,)
    first = of.steps == 0
    momentum = torch.where(first, g, h.beta1 * of.states[0].double() + (1 - h.beta2) * g)
    return p - lr * (g + h.beta1 * momentum if h.nesterov else momentum), momentum


def _adam(of: Updated, gradient: Tensor, multiplier: Tensor, inverse: Tensor) -> Sequence[Tensor]:
    h, p, lr = of.hyper, of.parameter.double(), _rate(of.hyper)
    exp_avg, exp_avg_sq, *largest = (state.double() for state in of.states)
    t = of.steps.double() + 1
    g = _multiplied(gradient, inverse, h)
    if h.decoupled:
        p = p - lr * h.weight_decay * p
    else:
        g = g + h.weight_decay * p
    exp_avg = h.beta1 * exp_avg + (1 - h.beta1) * g
    exp_avg_sq = h.beta2 * exp_avg_sq + (1 - h.beta2) * g * g
    if largest:
        largest = [torch.maximum(largest[0], exp_avg_sq)]
    mean = exp_avg / (1 - h.beta1**t)
    root = ((largest[0] if largest else exp_avg_sq) / (1 - h.beta2**t)).sqrt()
    return p - lr * multiplier * mean / (root + h.eps), exp_avg, exp_avg_sq, *largest


def _rate(hyper: Hyper) -> float | Tensor:
    return hyper.lr.double().reshape(()) if isinstance(hyper.lr, Tensor) else hyper.lr


def _multiplied(gradient: Tensor, multiplier: Tensor, hyper: Hyper) -> Tensor:
    precision = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    product = (gradient.to(precision) * multiplier.to(precision)).double()
    return -product if hyper.maximize else product
