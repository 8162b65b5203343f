"""Handwritten digits: scikit-learn's bundled 1797 images, and a residual network of 0.3 M parameters for them."""

from __future__ import annotations

from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from optpipe.progress import say
from optpipe.task import Task, top1_accuracy
from optpipe.training import Schedule, fit
from optpipe.zoo.weights import read_once, trained_once

TEST_IMAGES = 450
VALIDATION_IMAGES = 250
CALIBRATION_IMAGES = 256
MEAN, STD = 0.3053, 0.3760  # of the pixels, scaled to [0, 1]
EPOCHS = 5
MEDIAN_INK = 0.3057  # mean brightness of the median image


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2016), activation after the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        out: Tensor = self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))
        return out


class DigitsNet(nn.Module):
    """Images (n, 1, 32, 32) -> logits (n, 10)."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128), dropout: float = 0.1) -> None:
        super().__init__()
        stem, middle, last = widths
        self.stem = nn.Sequential(nn.Conv2d(1, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        self.blocks = nn.Sequential(
            BasicBlock(stem, stem, stride=1), BasicBlock(stem, middle, stride=2), BasicBlock(middle, last, stride=2)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(last, 10)

    def forward(self, image: Tensor) -> Tensor:
        features = self.flatten(self.pool(self.blocks(self.stem(image))))
        logits: Tensor = self.head(self.dropout(features))
        return logits


def task() -> Task:
    """Images (n, 1, 32, 32), upscaled from 8×8, and their digits; split once, stratified, the same on every machine."""
    kept = read_once(f"digits_data_{version('scikit-learn')}", _read)
    images = kept["images"].float().unsqueeze(1) / 16
    images = (nn.functional.interpolate(images, size=32, mode="bilinear") - MEAN) / STD

    def batches(part: str, *, size: int = 64, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        indices = kept[part]
        return DataLoader(TensorDataset(images[indices], kept["labels"][indices]), batch_size=size, shuffle=shuffle)

    return Task(
        train=batches("train", size=32, shuffle=True),
        validation=batches("validation"),
        calibration=batches("calibration"),
        test=batches("test"),
        example_inputs=images[kept["train"][:16]],
        metric=top1_accuracy(),
        fingerprint="scikit-learn digits 32x32, split 0",
        input_names=["image"],
        output_names=["logits"],
        class_names=[str(digit) for digit in range(10)],
        slices={"ink": ink},
    )


def _read() -> dict[str, Tensor]:
    """Images (1797, 8, 8) from 0 to 16, labels (1797,), and the indices of each split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()

    def split(indices: list[int], size: int) -> tuple[list[int], list[int]]:
        rest, part = train_test_split(indices, test_size=size, stratify=digits.target[indices], random_state=0)
        return rest, part

    rest, test = split(list(range(len(digits.target))), TEST_IMAGES)
    train, validation = split(rest, VALIDATION_IMAGES)
    _, calibration = split(train, CALIBRATION_IMAGES)
    parts = {"train": train, "validation": validation, "calibration": calibration, "test": test}
    return {
        "images": torch.from_numpy(digits.images).byte(),
        "labels": torch.from_numpy(digits.target),
        **{name: torch.tensor(indices) for name, indices in parts.items()},
    }


def ink(images: Tensor, _: Tensor) -> list[str]:
    """Whether a digit is drawn with less or more ink than most: a slice of the test split."""
    brightness = images.mean(dim=(1, 2, 3)) * STD + MEAN
    return ["dark" if mean > MEDIAN_INK else "light" for mean in brightness.tolist()]


def trained(seed: int = 0) -> DigitsNet:
    """The baseline. The first call on a machine trains it; later ones read the weights that it kept."""
    return trained_once(f"digits_{seed}_{EPOCHS}", DigitsNet(), lambda model: train(model, seed))


def train(model: DigitsNet, seed: int) -> None:
    """Train `model` in place on the digits, from a seeded start."""
    say("Training the reference network on digits (once; the weights are kept)")
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            module.reset_parameters()
    digits = task()
    # Twice as fast on a CPU. Not in `fit`: with some shapes, torch 2.13 crashes in the backward pass of a strided 1×1
    # convolution in this layout.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fit(
        model,
        digits.train,
        lambda inputs, outputs, target: digits.loss(outputs, target),
        Schedule(epochs=EPOCHS, learning_rate=3e-3),
        description="training digits",
    )
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
