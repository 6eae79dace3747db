"""Image data as tensors on the device, with the augmentation done there as well.

Everything is read once by `load`; an epoch is then one permutation and, per batch, one gather that
shuffles, crops and flips at the same time. Nothing is copied between host and device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch

NAMES = ("digits", "cifar10", "cifar10-16", "cifar100", "fake")


class DataMissing(Exception):
    """The data is not there; the message is one line that says how to get it."""


@dataclass(frozen=True, eq=False)
class Data:
    """A training and a test set. Images are uint8 [N, height, width, 3], labels int64 [N].

    The training images carry `padding` black pixels on every side, from which crops are taken.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: int
    padding: int
    flip: bool
    mean: torch.Tensor  # fp32 [3], in units of a pixel's 0..255
    std: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.train_images.device

    def hold_out(self, validation: int, train: int | None = None, seed: int = 0) -> Data:
        """The same with `validation` training images in the test set's place.

        `train` of the others are trained on, all of them if it is None. Either set holds equally
        many images of each class (but for the remainder, and with `train=None`), drawn by `seed`
        and shuffled. The test images themselves are not looked at. Raises `ValueError` if there
        are not as many.
        """
        labels = self.train_labels.cpu()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator)
        taken = self._share(labels[order], validation)
        held, rest = order[taken], order[~taken]
        kept = rest if train is None else rest[self._share(labels[rest], train)]
        size = self.train_images.shape[1:3]
        height, width = (slice(self.padding, side - self.padding) for side in size)
        return replace(
            self,
            train_images=self.train_images[kept.to(self.device)],
            train_labels=self.train_labels[kept.to(self.device)],
            test_images=self.train_images[held.to(self.device)][:, height, width],
            test_labels=self.train_labels[held.to(self.device)],
        )

    def _share(self, labels: torch.Tensor, count: int) -> torch.Tensor:
        """A mask of the first images of every class, `count` in all."""
        mask = torch.zeros(len(labels), dtype=torch.bool)
        for number in range(self.classes):
            quota = count // self.classes + (number < count % self.classes)
            mask[(labels == number).nonzero()[:quota, 0]] = True
        if mask.sum() < count:
            raise ValueError(
                f"{self.name}: {count} images of {self.classes} classes in equal shares cannot be "
                f"held out or trained on; there are {len(labels)}, of some classes too few"
            )
        return mask

    def steps(self, batch: int) -> int:
        """Batches in one epoch; a last batch that is not full is left out, unless it is alone."""
        return max(len(self.train_labels) // batch, 1)

    def train_batches(
        self, batch: int, generator: torch.Generator
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One epoch in random order: fp32 images [batch, 3, H, W] (channels-last) and labels.

        Every image is cropped at random out of its padding and, if `flip`, mirrored half of the
        time. `generator` lives on the data's device.
        """
        count, device = len(self.train_labels), self.device
        height, width = self.test_images.shape[1:3]
        order = torch.randperm(count, generator=generator, device=device)
        draw = torch.rand(3, count, generator=generator, device=device)
        top, left = (draw[:2] * (2 * self.padding + 1)).long()
        rows = top[:, None] + torch.arange(height, device=device)
        columns = torch.arange(width, device=device).expand(count, width)
        if self.flip:
            columns = torch.where(draw[2, :, None] < 0.5, columns.flip(1), columns)
        columns = left[:, None] + columns
        for step in range(self.steps(batch)):
            here = slice(step * batch, (step + 1) * batch)
            index = order[here]
            images = self.train_images[
                index[:, None, None], rows[here, :, None], columns[here, None, :]
            ]
            yield self._normalised(images), self.train_labels[index]

    def test_batches(self, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The test set in order, as `train_batches` but not augmented and complete."""
        for start in range(0, len(self.test_labels), batch):
            here = slice(start, start + batch)
            yield self._normalised(self.test_images[here]), self.test_labels[here]

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        return ((images - self.mean) / self.std).permute(0, 3, 1, 2)


def load(
    name: str, root: str | Path = "data", download: bool = False, device: str | torch.device = "cpu"
) -> Data:
    """Reads one of `NAMES` into tensors on `device`.

    CIFAR comes from `root/<name>.npz` if there is one (x_train, y_train, x_test, y_test: uint8
    [N, 32, 32, 3] and integer labels, in any order), else from torchvision's files under `root`,
    fetched when `download` is set. "cifar10-16" is CIFAR-10 averaged to 16 by 16. Raises
    `DataMissing` when it is not there, `ValueError` for another name or an .npz of another make.
    """
    if name == "digits":
        arrays, padding, flip = _digits(), 1, False
    elif name == "fake":
        arrays, padding, flip = _fake(), 4, True
    elif name == "cifar10-16":
        x_train, y_train, x_test, y_test = _cifar("cifar10", Path(root), download)
        arrays = (_halved(x_train), y_train, _halved(x_test), y_test)
        padding, flip = 2, True
    elif name in NAMES:
        arrays, padding, flip = _cifar(name, Path(root), download), 4, True
    else:
        raise ValueError(f"data={name!r}: must be one of {', '.join(NAMES)}")
    x_train, y_train, x_test, y_test = arrays
    pixels = x_train.reshape(-1, 3)
    sides = (padding, padding)
    padded = numpy.pad(x_train, ((0, 0), sides, sides, (0, 0)))

    def tensor(array: numpy.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(array, dtype=dtype).to(device)

    return Data(
        name=name,
        train_images=tensor(padded, torch.uint8),
        train_labels=tensor(y_train, torch.int64),
        test_images=tensor(x_test, torch.uint8),
        test_labels=tensor(y_test, torch.int64),
        classes=int(y_train.max()) + 1,
        padding=padding,
        flip=flip,
        mean=tensor(pixels.mean(0, dtype=numpy.float64), torch.float32),
        std=tensor(pixels.std(0, dtype=numpy.float64), torch.float32),
    )


def _digits() -> tuple[numpy.ndarray, ...]:
    """scikit-learn's handwritten digits, 8 by 8: 1437 to train on, 360 to test on."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise DataMissing("digits: comes with scikit-learn; pip install scikit-learn") from None
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(numpy.uint8)
    images = images[..., None].repeat(3, axis=3)
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=360, stratify=digits.target, random_state=0
    )
    return x_train, y_train, x_test, y_test


def _fake() -> tuple[numpy.ndarray, ...]:
    """Ten random patterns, 32 by 32, under noise: 512 images to train on, 128 to test on."""
    random = numpy.random.default_rng(0)
    patterns = random.uniform(64, 192, (10, 32, 32, 3))
    labels = random.integers(0, 10, 640)
    images = patterns[labels] + random.normal(0, 40, (640, 32, 32, 3))
    images = images.clip(0, 255).astype(numpy.uint8)
    return images[:512], labels[:512], images[512:], labels[512:]


def _halved(images: numpy.ndarray) -> numpy.ndarray:
    """Every two by two pixels averaged, rounded to the nearest."""
    n, height, width, channels = images.shape
    blocks = images.reshape(n, height // 2, 2, width // 2, 2, channels)
    return ((blocks.sum((2, 4), dtype=numpy.uint16) + 2) // 4).astype(numpy.uint8)


def _cifar(name: str, root: Path, download: bool) -> tuple[numpy.ndarray, ...]:
    archive = root / f"{name}.npz"
    if archive.is_file():
        return _archive(archive)
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        with warnings.catch_warnings():  # torchvision's pickles warn under recent NumPy releases
            warnings.simplefilter("ignore")
            train, test = (kind(root, train=part, download=download) for part in (True, False))
    except (RuntimeError, OSError) as error:
        if download:
            raise DataMissing(f"{name}: the download to {root} failed ({error})") from None
        raise DataMissing(
            f"{name}: not found under {root}; add --download to fetch it, or put a {archive.name} "
            "with x_train, y_train, x_test and y_test there"
        ) from None
    return train.data, numpy.array(train.targets), test.data, numpy.array(test.targets)


def _archive(path: Path) -> tuple[numpy.ndarray, ...]:
    keys = ("x_train", "y_train", "x_test", "y_test")
    with numpy.load(path) as archive:
        missing = [key for key in keys if key not in archive]
        if missing:
            raise ValueError(f"{path}: has no {', '.join(missing)}; expected {', '.join(keys)}")
        x_train, y_train, x_test, y_test = (archive[key] for key in keys)
    for key, images in (("x_train", x_train), ("x_test", x_test)):
        if images.dtype != numpy.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(
                f"{path}: {key} is {images.dtype} {list(images.shape)}; expected uint8 [N, H, W, 3]"
            )
    return x_train, y_train.reshape(-1), x_test, y_test.reshape(-1)
