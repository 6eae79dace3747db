"""The training code of bench: data, models, runs, and the command line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
import torch

pytest.importorskip("rich")
try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pytest.skip("torchvision is not installed", allow_module_level=True)
except RuntimeError:
    if torch.version.cuda is not None:
        raise
    # torchvision's registry wheel wants operators that it only has beside a CUDA build of torch.
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from bench.accuracy import demo, models, train
from bench.accuracy.data import Data, DataMissing, load

RECIPE = train.Recipe(arch="cnn", epochs=2, batch=32, lr=0.05)


@pytest.fixture(scope="module")
def fake() -> Data:
    return load("fake")


# ---- data ---------------------------------------------------------------------------


def test_batches_are_crops_of_the_padded_images(fake: Data) -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = next(fake.train_batches(8, generator))
    assert images.shape == (8, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    pixels = (images.permute(0, 2, 3, 1) * fake.std + fake.mean).round().to(torch.uint8)
    windows = fake.train_images.unfold(1, 32, 1).unfold(2, 32, 1).permute(0, 1, 2, 4, 5, 3)
    for image, label in zip(pixels, labels, strict=True):
        here = windows[fake.train_labels == label]
        found = [(here == way).flatten(3).all(3).any() for way in (image, image.flip(1))]
        assert any(found)


def test_digits_keep_their_orientation() -> None:
    pytest.importorskip("sklearn")
    digits = load("digits")
    assert len(digits.train_labels) == 1437
    assert len(digits.test_labels) == 360
    assert digits.classes == 10
    assert not digits.flip
    images, _ = next(digits.test_batches(360))
    assert images.shape == (360, 3, 8, 8)


def test_an_archive_sorted_by_class_is_shuffled(tmp_path: Path) -> None:
    labels = numpy.arange(10).repeat(20)
    images = numpy.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=numpy.uint8)
    numpy.savez(
        tmp_path / "cifar10.npz", x_train=images, y_train=labels[:, None],
        x_test=images[:50], y_test=labels[:50],
    )  # fmt: skip
    data = load("cifar10", tmp_path)
    assert data.train_images.shape == (200, 40, 40, 3)
    assert data.test_images.shape == (50, 32, 32, 3)
    assert torch.equal(data.test_images, torch.from_numpy(images[:50]))
    batches = list(data.train_batches(50, torch.Generator().manual_seed(0)))
    assert all(len(labels.unique()) > 5 for _, labels in batches)
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [20] * 10


def test_images_are_held_out_by_class(fake: Data) -> None:
    data = fake.hold_out(100, 200)
    assert (data.train_images.shape, data.test_images.shape) == ((200, 40, 40, 3), (100, 32, 32, 3))
    assert data.test_labels.bincount().tolist() == [10] * 10
    assert data.train_labels.bincount().tolist() == [20] * 10
    assert not data.test_labels[:10].eq(data.test_labels[0]).all()  # shuffled
    inside = fake.train_images[:, 4:-4, 4:-4].flatten(1)
    pairs = (
        (data.train_images[:, 4:-4, 4:-4], data.train_labels),
        (data.test_images, data.test_labels),
    )
    found = []
    for images, labels in pairs:
        same = (images.flatten(1)[:, None] == inside[None]).all(2)
        assert same.sum(1).eq(1).all()
        found.append(same.int().argmax(1))
        assert torch.equal(fake.train_labels[found[-1]], labels)
    assert not set(found[0].tolist()) & set(found[1].tolist())
    again, other = fake.hold_out(100, 200), fake.hold_out(100, 200, seed=1)
    assert torch.equal(again.test_images, data.test_images)
    assert not torch.equal(other.test_images, data.test_images)
    everything = fake.hold_out(100)
    assert len(everything.train_labels) == 412
    with pytest.raises(ValueError, match="held out"):
        fake.hold_out(500, 100)


def test_an_archive_of_another_make_is_refused(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "cifar100.npz", x_train=numpy.zeros((2, 32, 32, 3)))
    with pytest.raises(ValueError, match="has no y_train, x_test, y_test"):
        load("cifar100", tmp_path)


def test_a_missing_dataset_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match="--download"):
        load("cifar100", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--data", "cifar10", "--root", str(tmp_path)])
    line = str(stopped.value)
    assert "\n" not in line
    assert str(tmp_path) in line
    assert "--download" in line
    assert "cifar10.npz" in line


# ---- models -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "millions"),
    [("resnet18", 11.17), ("resnet34", 21.28), ("resnet50", 23.52), ("vgg19_bn", 20.04)],
)
def test_architectures_have_their_known_size(arch: str, millions: float) -> None:
    with torch.device("meta"):
        model = models.build(arch, 10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("arch", models.NAMES)
def test_width_scales_every_architecture(arch: str, fake: Data) -> None:
    model = models.build(arch, 10, width=0.125)
    images, _ = next(fake.test_batches(2))
    assert model(images).shape == (2, 10)


# ---- training -----------------------------------------------------------------------


def test_the_rate_rises_and_falls() -> None:
    recipe = train.Recipe(lr=0.4, warmup=0.25)
    rates = [recipe.rate(step, 40) for step in range(40)]
    assert rates[9] == pytest.approx(0.4)
    assert max(rates) == pytest.approx(0.4)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.02


def test_the_rate_falls_in_steps() -> None:
    recipe = train.Recipe(lr=0.4, warmup=0.0, fall="steps")
    rates = [recipe.rate(step, 40) for step in range(40)]
    assert rates == pytest.approx([0.4] * 20 + [0.04] * 10 + [0.004] * 10)
    with pytest.raises(ValueError, match="fall='cosine'"):
        train.Recipe(fall="cosine")  # type: ignore[arg-type]


def test_measuring_alone_changes_nothing(fake: Data) -> None:
    plain = train.train(fake, RECIPE)
    measured = train.train(fake, RECIPE, {"refresh": 1000, "backend": "torch"})
    assert plain.epochs == measured.epochs
    assert not plain.diverged
    assert plain.history == []
    assert len(measured.history) == 2


def test_amplified_training_reports_what_it_amplified(fake: Data) -> None:
    plain = train.train(fake, RECIPE)
    options = {"min_steps": 2, "refresh": 4, "backend": "torch"}
    amplified = train.train(fake, RECIPE, options)
    assert [report.steps for report in amplified.history] == [16, 32]
    report = amplified.history[-1]
    assert report.skipped_steps == 0
    assert any(layer.selected for layer in report.layers)
    assert any(0 < layer.amplified_steps <= 28 for layer in report.layers)
    assert amplified.epochs != plain.epochs
    assert amplified.epochs[-1].train_loss < amplified.epochs[0].train_loss
    assert not amplified.diverged


def test_a_diverged_run_ends_and_says_so(fake: Data) -> None:
    seen: list[int] = []
    recipe = train.Recipe(arch="cnn", epochs=50, batch=64, lr=1e8, warmup=0.0)
    result = train.train(fake, recipe, on_epoch=lambda number, epoch, model: seen.append(number))
    assert result.diverged
    assert len(seen) == len(result.epochs) < 50


def test_the_command_line_trains(capsys: pytest.CaptureFixture[str]) -> None:
    amplification = ["--backend=torch", "--threshold=0.0", "--min-steps=2", "--refresh=2"]
    train.main(["--data=fake", "--arch=cnn", "--epochs=1", "--lr=0.05", "--bf16", *amplification])
    printed = capsys.readouterr().out
    assert "epoch 1/1" in printed
    assert "accuracy" in printed
    with pytest.raises(SystemExit, match="epochs=0"):
        train.main(["--epochs=0"])
    with pytest.raises(SystemExit, match="measure"):
        train.main(["--data=fake", "--arch=cnn", "--measure=fluctuations"])


# ---- the demonstration --------------------------------------------------------------


def test_the_demonstration_ends_with_three_lines_and_a_picture(
    fake: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "load", lambda name: fake)
    monkeypatch.setattr(demo, "TUNED", RECIPE)
    threads = torch.get_num_threads()
    picture = tmp_path / "new folder" / "demo.png"
    try:
        demo.main(["--epochs=5", f"--out={picture}"])
        first = capsys.readouterr().out
        demo.main(["--epochs=1", f"--out={picture}", "--full"])
        full = capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)
    assert picture.stat().st_size > 10_000
    accuracy, factors, direction, path = first.partition("\n\n")[2].splitlines()
    assert accuracy.startswith("Accuracy on 128 test images at learning rate 0.0005: ")
    assert re.fullmatch(
        r"Factors grew to between \d.* and \d.*; [0-5] of 5 layers have settled", factors
    )
    assert direction.endswith("above 0.10 the learning rate is low")
    assert path.endswith(f": {picture}")
    assert "Layers at the end" not in first
    assert "Layers at the end" in full
    assert "Factors grew to between 1 (" in full  # 16 steps, and no decision before the 50th
