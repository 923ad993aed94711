"""Loads images to train on: CIFAR-10, digits, a folder such as ImageNet's, or generated images."""

from __future__ import annotations

import functools
import io
import itertools
import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deq_phantom_plugin._plumbing.extras import require

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
# The means and standard deviations of CIFAR-10 and ImageNet are those of the official code
# (locuslab/mdeq, tools/cls_train.py).
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
DIGITS = ((0.305,) * 3, (0.376,) * 3)  # measured on all digits
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIDE = 32  # the side of CIFAR-10's images in pixels
PADDING = 4  # pixels on each side, for the random crops of the official code on CIFAR-10
CROP = 0.875  # the share of an image's shorter side that is kept in evaluation on ImageNet
WORKERS = 8  # threads that read files

HELP = {
    "cifar10": (
        "the archive cifar10-jpeg.npz, or torchvision's folder of CIFAR-10, with "
        "cifar-10-batches-py in it"
    ),
    "folder": "a folder with train/ and val/, each with one subfolder of images per class",
}


class ImageSet(ABC):
    """Images with labels.

    Attributes:
        labels: the class of each image, shape (N,), int64.
        classes: the number of classes.
    """

    labels: Tensor
    classes: int

    @abstractmethod
    def batch(self, indices: Tensor, augment: torch.Generator | None = None) -> Tensor:
        """Return standardised images, shape (len(indices), 3, H, W), float32.

        Args:
            indices: the indices of the images, shape (n,).
            augment: a generator that draws random crops and flips; None for no augmentation.
        """


class StoredImages(ImageSet):
    """Images in memory; the augmentation flips them and crops them from a frame of zeros.

    Args:
        pixels: shape (N, 3, H, W), uint8.
        labels: the class of each image, shape (N,).
        classes: the number of classes.
        moments: mean and standard deviation of each channel, for pixels divided by 255.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, classes: int, moments: Any = CIFAR10
    ) -> None:
        self.pixels, self.labels, self.classes = pixels, labels, classes
        self.mean, self.std = (torch.tensor(m)[:, None, None] for m in moments)

    def batch(self, indices: Tensor, augment: torch.Generator | None = None) -> Tensor:
        """See `ImageSet`."""
        images = (self.pixels[indices].float() / 255 - self.mean) / self.std
        if augment is None:
            return images
        count, channels, height, width = images.shape
        framed = torch.nn.functional.pad(images, (PADDING,) * 4)
        top, left = torch.randint(2 * PADDING + 1, (2, count, 1), generator=augment)
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        flip = torch.rand(count, 1, generator=augment) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
        sample, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)
        return framed[
            sample, channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
        ]


class FolderImages(ImageSet):
    """Image files, which several threads read when they are needed.

    As in the official code, training takes a random part of the image, with 8 to 100 % of its area
    and an aspect ratio of 3/4 to 4/3, and flips it at random. Evaluation takes the centre.

    Args:
        folder: a folder with one subfolder per class.
        size: the side of the square images in pixels.

    Raises:
        ValueError: if there are fewer than two subfolders, or if one is empty.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._image = require("PIL.Image", "vision")
        self._numpy = require("numpy", "vision")
        names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        if len(names) < 2:
            raise ValueError(f"{folder} has {len(names)} subfolders; expected one per class")
        self.files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(names):
            files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
            if not files:
                raise ValueError(f"{folder / name} has no images ({', '.join(sorted(SUFFIXES))})")
            self.files += files
            labels += [label] * len(files)
        self.labels, self.classes, self.size = torch.tensor(labels), len(names), size
        self.mean, self.std = (torch.tensor(m)[:, None, None] for m in IMAGENET)
        self._threads = ThreadPoolExecutor(WORKERS)

    def batch(self, indices: Tensor, augment: torch.Generator | None = None) -> Tensor:
        """See `ImageSet`."""
        numbers = [None] * len(indices)
        if augment is not None:
            numbers = torch.rand(len(indices), 5, generator=augment).tolist()
        files = [self.files[i] for i in indices.tolist()]
        pixels = torch.stack(list(self._threads.map(self._read, files, numbers)))
        return (pixels.float() / 255 - self.mean) / self.std

    def _read(self, file: Path, numbers: Sequence[float] | None) -> Tensor:
        try:
            with self._image.open(file) as opened:
                image = opened.convert("RGB")
        except OSError as error:
            raise ValueError(f"{file} cannot be read as an image: {error}") from None
        width, height = image.size
        if numbers is None:
            side = min(width, height) * CROP
            across = down = side
            left, top = (width - side) / 2, (height - side) / 2
        else:
            area = (0.08 + 0.92 * numbers[0]) * width * height
            aspect = (3 / 4) ** (1 - 2 * numbers[1])  # its logarithm is uniform
            across = min(width, (area * aspect) ** 0.5)
            down = min(height, (area / aspect) ** 0.5)
            left, top = numbers[2] * (width - across), numbers[3] * (height - down)
        square = image.resize(
            (self.size, self.size),
            self._image.Resampling.BILINEAR,
            box=(left, top, left + across, top + down),
        )
        pixels = torch.from_numpy(self._numpy.asarray(square).copy()).permute(2, 0, 1)
        return pixels.flip(2) if numbers is not None and numbers[4] < 0.5 else pixels


@functools.cache
def load_images(
    name: str, path: Path | None, train: int, test: int, size: int
) -> tuple[ImageSet, ImageSet]:
    """Return training and test images.

    Args:
        name: "cifar10", "digits" (scikit-learn's), "folder", or "generated".
        path: the path of the data; None for digits and generated images.
        train: the number of training images, which are the first ones; 0 for all of them.
        test: the number of test images, which are the first ones; 0 for all of them.
        size: the side of an image in pixels: 8 for digits; 32 for CIFAR-10, or a divisor of 32, to
            which the images are averaged.

    Raises:
        SystemExit: if there is nothing at the path, or if a path is given and not needed; the
            message says what is expected.
        ValueError: if the name is unknown, or the images cannot have this size.
    """
    if name in ("generated", "digits"):
        if path is not None:
            raise SystemExit(
                f"--data {path} for {name} images, which are not read from files; leave --data "
                "out, or add --set dataset=cifar10"
            )
        if name == "digits":
            return digits(train, test, size)
        return generate(train, 0, size), generate(test, 1, size)
    if name not in HELP:
        raise ValueError(f"dataset={name!r}; expected {', '.join(HELP)}, digits or generated")
    if name == "cifar10" and (size < 1 or SIDE % size):
        raise ValueError(f"image_size={size} of cifar10; expected {SIDE} or a divisor of it")
    if path is None or not path.exists():
        missing = "needs --data PATH" if path is None else f"{path} is not there; expected"
        raise SystemExit(f"{name} {missing}: {HELP[name]}")
    if name == "cifar10":
        read = _read_archive if path.is_file() else _read_torchvision
        return read(path, "train", train, size), read(path, "test", test, size)
    try:
        return FolderImages(path / "train", size), FolderImages(path / "val", size)
    except ValueError as error:
        raise SystemExit(f"{error}; --data is {HELP[name]}") from None


def generate(count: int, seed: int, size: int, classes: int = 10) -> ImageSet:
    """Return noisy gratings; their direction and frequency depend on their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    angle = labels * torch.pi / classes
    frequency = 2 * torch.pi * (1 + labels % 3) / 8
    axis = torch.arange(size, dtype=torch.float32)
    phase = 2 * torch.pi * torch.rand(count, 1, 1, generator=generator)
    across = (angle.cos()[:, None, None] * axis) + (angle.sin()[:, None, None] * axis[:, None])
    waves = torch.sin(frequency[:, None, None] * across + phase)[:, None]
    noise = torch.randn(count, 3, size, size, generator=generator)
    pixels = (127 + 60 * waves + 30 * noise).clamp(0, 255).to(torch.uint8)
    return StoredImages(pixels, labels, classes)


def digits(train: int, test: int, size: int) -> tuple[ImageSet, ImageSet]:
    """Return scikit-learn's handwritten digits in grey, for training and for tests.

    Raises:
        SystemExit: if there are fewer digits than that.
        ValueError: if the size is not that of the digits.
    """
    found = require("sklearn.datasets", "vision").load_digits()
    count, side = found.images.shape[:2]
    if size != side:
        raise ValueError(f"image_size={size} of digits; expected {side}")
    if min(train, test) < 1 or train + test > count:
        raise SystemExit(
            f"{train} digits and {test} to test on; there are {count}. Expected at least 1 of "
            f"each, and at most {count} together"
        )
    # Shuffled once, since the last digits were written by other people than the first.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    pixels = (torch.tensor(found.images) * (255 / 16)).to(torch.uint8)
    pixels, labels = pixels[order, None].expand(-1, 3, -1, -1), torch.tensor(found.target)[order]
    chosen = slice(train), slice(train, train + test)
    first, second = (StoredImages(pixels[c], labels[c].long(), 10, DIGITS) for c in chosen)
    return first, second


def _averaged(pixels: Tensor, size: int) -> Tensor:
    """Return CIFAR-10 images averaged to a smaller size, uint8."""
    if size == SIDE:
        return pixels.contiguous()
    return torch.nn.functional.adaptive_avg_pool2d(pixels.float(), size).round().to(torch.uint8)


def _read_archive(path: Path, split: str, count: int, size: int) -> ImageSet:
    """Read images from the archive cifar10-jpeg.npz."""
    image, numpy = require("PIL.Image", "vision"), require("numpy", "vision")
    # NumPy takes a file that is not an archive for a pickle, and advises to allow pickles.
    if not zipfile.is_zipfile(path):
        raise SystemExit(f"{path} is no archive; expected {HELP['cifar10']}")
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            data, offsets = archive[f"{split}_jpeg"], archive[f"{split}_offsets"]
            labels = torch.from_numpy(archive[f"{split}_labels"].astype("int64"))
            classes = len(archive["classes"])
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{path} cannot be read: {error}; expected {HELP['cifar10']}") from None
    labels = labels[: count or None]
    pixels = [
        torch.from_numpy(
            numpy.asarray(image.open(io.BytesIO(data[begin:end].tobytes())).convert("RGB")).copy()
        )
        for begin, end in itertools.pairwise(offsets[: len(labels) + 1])
    ]
    return StoredImages(_averaged(torch.stack(pixels).permute(0, 3, 1, 2), size), labels, classes)


class _Arrays(pickle.Unpickler):
    """Reads arrays and their containers only, since other pickles can run code."""

    ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _read_torchvision(path: Path, split: str, count: int, size: int) -> ImageSet:
    """Read the files of CIFAR-10's Python version."""
    folder = path if path.name == "cifar-10-batches-py" else path / "cifar-10-batches-py"
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    pixels, labels = [], []
    for name in names:
        try:
            with (folder / name).open("rb") as file:
                batch = _Arrays(file, encoding="bytes").load()
            pixels.append(torch.from_numpy(batch[b"data"]).view(-1, 3, 32, 32))
            labels += batch[b"labels"]
        except (OSError, KeyError, pickle.UnpicklingError) as error:
            message = f"{folder / name} cannot be read: {error}; expected {HELP['cifar10']}"
            raise SystemExit(message) from None
    chosen = slice(count or None)
    return StoredImages(
        _averaged(torch.cat(pixels)[chosen], size), torch.tensor(labels)[chosen], 10
    )
