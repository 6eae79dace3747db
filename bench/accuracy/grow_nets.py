"""Small networks of the kinds that take badly to a wrong learning rate, for images of 8 by 8."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

SIDE = 8


def _fully_connected(widths: list[int], classes: int, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in zip([SIDE * SIDE, *widths], widths, strict=False):
        layers.append(nn.Linear(inputs, outputs))
        if norm:
            layers.append(nn.LayerNorm(outputs))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def linear(classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, classes))


def mlp(classes: int) -> nn.Sequential:
    return _fully_connected([64, 64], classes)


def deep(classes: int) -> nn.Sequential:
    """Six layers without norm, initialised as torch does: they stay on a plateau for long."""
    return _fully_connected([64] * 5, classes)


def layernorm(classes: int) -> nn.Sequential:
    return _fully_connected([48] * 4, classes, norm=True)


def _convolutions(classes: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 8, 1), (8, 16, 2), (16, 16, 1)):
        layers.append(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * (SIDE // 2) ** 2, classes))


def cnn(classes: int) -> nn.Sequential:
    return _convolutions(classes, norm=False)


def cnn_bn(classes: int) -> nn.Sequential:
    return _convolutions(classes, norm=True)


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a norm and added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, tokens, width] to the same."""
        n, count, width = tokens.shape
        packed = self.query_key_value(self.attention_norm(tokens))
        q, k, v = packed.view(n, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        tokens = tokens + self.out((weights @ v).transpose(1, 2).reshape(n, count, width))
        return tokens + self.down(torch.relu(self.up(self.feed_norm(tokens))))


class Transformer(nn.Module):
    """Two blocks over an image's rows as tokens."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(SIDE, width)
        self.position = nn.Parameter(torch.randn(SIDE, width) * 0.1)
        self.blocks = nn.Sequential(Block(width, heads=4), Block(width, heads=4))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """fp32 [N, 1, 8, 8] to logits [N, classes]."""
        tokens = self.blocks(self.embed(images.squeeze(1)) + self.position)
        return self.head(self.norm(tokens).mean(1))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "linear": linear,
    "mlp": mlp,
    "deep": deep,
    "layernorm": layernorm,
    "cnn": cnn,
    "cnn_bn": cnn_bn,
    "transformer": Transformer,
}
