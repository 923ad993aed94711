"""The images of a comparison.

They are scikit-learn's handwritten digits, or those in a folder that has one subfolder per class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .._plumbing.extras import require

TEST_SHARE = 0.2
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Dataset:
    """Images and labels, split into a training set and a test set.

    Attributes:
        name: the name of the dataset, for titles.
        classes: the names of the classes, in the order of the labels.
        train_images: shape (N, C, H, W), standardised.
        train_labels: shape (N,).
        test_images: shape (M, C, H, W).
        test_labels: shape (M,).
    """

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Dataset:
    """Load the 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships.

    Raises:
        ImportError: without scikit-learn.
    """
    digits = require("sklearn.datasets", "vision").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    classes = tuple(str(name) for name in digits.target_names)
    return _split("digits", classes, images, torch.tensor(digits.target, dtype=torch.long))


def load_folder(folder: str | Path, image_size: int) -> Dataset:
    """Load a folder of images, with one subfolder per class, as RGB squares.

    Args:
        folder: the folder.
        image_size: the side in pixels to which images are resized.

    Raises:
        ImportError: without Pillow.
        ValueError: if the folder is missing, has fewer than two classes, a class has fewer than
            two images, or a file cannot be read.
    """
    image_module = require("PIL.Image", "vision")
    numpy = require("numpy", "vision")
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(
            f"{root} is not a folder; expected 'digits', or a folder with one subfolder of images "
            "per class"
        )
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    if len(classes) < 2:
        count = len(classes)
        raise ValueError(f"{root} has {count} subfolders; expected one per class, at least 2")
    found: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        files = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in _SUFFIXES)
        if len(files) < 2:
            raise ValueError(
                f"{root / name} has {len(files)} images; expected at least 2, one for the test"
            )
        found += [(file, label) for file in files]
    # The first images are a batch of their own, on which gradients and memory are measured. In the
    # order of the folders it would be a batch of one class.
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    images, labels = [], []
    for file, label in (found[i] for i in order):
        try:
            with image_module.open(file) as image:
                pixels = image.convert("RGB").resize((image_size, image_size))
        except OSError as error:
            raise ValueError(
                f"{file} cannot be read as an image: {error}. Remove the file, or mend it"
            ) from None
        images.append(torch.from_numpy(numpy.asarray(pixels).copy()).permute(2, 0, 1))
        labels.append(label)
    stacked = torch.stack(images).float()
    return _split(root.name, tuple(classes), stacked, torch.tensor(labels))


def _split(name: str, classes: tuple[str, ...], images: Tensor, labels: Tensor) -> Dataset:
    """Hold out a share of every class as the test set, and standardise by the training images.

    The same images are held out each time.
    """
    generator = torch.Generator().manual_seed(0)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(classes)):
        members = torch.nonzero(labels == label).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        test[members[: max(1, round(TEST_SHARE * len(members)))]] = True
    mean = images[~test].mean(dim=(0, 2, 3), keepdim=True)
    deviation = images[~test].std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-6)
    images = (images - mean) / deviation
    return Dataset(name, classes, images[~test], labels[~test], images[test], labels[test])
