"""torchvision's architectures, adapted to small images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vgg import cfgs, make_layers

NAMES = ("resnet10", "resnet18", "resnet34", "resnet50", "vgg19_bn", "cnn", "tanh")


class SmallImageResNet(ResNet):
    """torchvision's ResNet with a 3x3 stem of stride 1 and no max-pooling.

    `width` multiplies every layer's number of channels (1.0: 64 in the stem).
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], depths: list[int], classes: int, width: float
    ) -> None:
        self.width = width
        super().__init__(block, depths, classes)
        stem = scaled(64, width)
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(stem)
        self.maxpool = nn.Identity()
        self.fc = nn.Linear(scaled(512, width) * block.expansion, classes)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        if planes == 64:
            self.inplanes = scaled(64, self.width)
        return super()._make_layer(block, scaled(planes, self.width), *args, **kwargs)


class SmallImageVGG(nn.Module):
    """torchvision's VGG-19 features with batch normalisation, and one linear layer as its head.

    Needs images of at least 32 by 32 pixels. `width` multiplies every layer's channels.
    """

    def __init__(self, classes: int, width: float) -> None:
        super().__init__()
        channels = [scaled(c, width) if isinstance(c, int) else c for c in cfgs["E"]]
        self.features = make_layers(channels, batch_norm=True)
        self.classifier = nn.Linear(scaled(512, width), classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.get_parameter("bias"))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """fp32 [N, 3, H, W] to logits [N, classes]."""
        if min(images.shape[2:]) < 32:
            raise ValueError(
                f"vgg19_bn: images of {images.shape[2]}x{images.shape[3]} are too small for its "
                "five poolings; use images of at least 32x32 or another --arch"
            )
        return self.classifier(self.features(images).mean((2, 3)))


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, at least 1."""
    return max(round(channels * width), 1)


def small_cnn(classes: int, width: float) -> nn.Sequential:
    """Two convolutions and a linear layer, for tests."""
    first, second = scaled(16, width), scaled(32, width)
    return nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * second, classes),
    )


def deep_tanh(classes: int, width: float) -> nn.Sequential:
    """Ten linear layers, tanh between them; with torch's initialisation signals fade in it."""
    hidden = scaled(64, width)
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(8), nn.Flatten()]
    for inputs in (3 * 8 * 8, *[hidden] * 8):
        layers += [nn.Linear(inputs, hidden), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


def build(arch: str, classes: int, width: float = 1.0) -> nn.Module:
    """One of `NAMES`, freshly initialised from torch's global generator, on the CPU.

    `width` multiplies all channel counts. Raises `ValueError` for an unknown name or a width that
    is not positive.
    """
    if not width > 0:
        raise ValueError(f"width={width}: must be positive")
    if arch == "resnet10":
        return SmallImageResNet(BasicBlock, [1, 1, 1, 1], classes, width)
    if arch == "resnet18":
        return SmallImageResNet(BasicBlock, [2, 2, 2, 2], classes, width)
    if arch == "resnet34":
        return SmallImageResNet(BasicBlock, [3, 4, 6, 3], classes, width)
    if arch == "resnet50":
        return SmallImageResNet(Bottleneck, [3, 4, 6, 3], classes, width)
    if arch == "vgg19_bn":
        return SmallImageVGG(classes, width)
    if arch == "tanh":
        return deep_tanh(classes, width)
    if arch == "cnn":
        return small_cnn(classes, width)
    raise ValueError(f"arch={arch!r}: must be one of {', '.join(NAMES)}")
