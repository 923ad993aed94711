"""Loads the images of the benchmarks: from a file, from scikit-learn, or random ones."""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

N_IMAGES = 2048


@dataclass(frozen=True)
class Images:
    """Standardised colour images and their labels.

    Attributes:
        name: a description of the images.
        pixels: shape (N, 3, 32, 32).
        labels: the class of each image, shape (N,).
    """

    name: str
    pixels: Tensor
    labels: Tensor

    def batch(self, size: int, side: int, memory_format: torch.memory_format) -> Tensor:
        """Return the first images, shape (size, 3, side, side), in a memory format."""
        pixels = self.pixels[:size]
        if side != pixels.shape[-1]:
            pixels = F.interpolate(pixels, side, mode="bilinear", antialias=True)
        return pixels.contiguous(memory_format=memory_format)


@lru_cache(maxsize=1)
def load_images(file: Path | None) -> Images:
    """Return images from an .npz file of JPEGs.

    Without a file, they are scikit-learn's digits, or random images without scikit-learn.

    Args:
        file: has `train_jpeg` (the bytes of all images), `train_offsets` (where each image begins,
            and the end of the last one) and `train_labels`.
    """
    if file is not None:
        return _standardised(f"{N_IMAGES} JPEG images of {file.name}", *_from_file(file))
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(N_IMAGES, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (N_IMAGES,), generator=generator)
        return Images("random numbers (no --images, no scikit-learn)", pixels, labels)
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    pixels = F.interpolate(small, 32, mode="bilinear")
    name = "scikit-learn's digits, resized to 32 x 32 (no --images)"
    return _standardised(name, pixels, torch.tensor(digits.target))


def _from_file(file: Path) -> tuple[Tensor, Tensor]:
    import numpy as np
    from PIL import Image

    with np.load(file) as arrays:
        encoded, offsets = arrays["train_jpeg"], arrays["train_offsets"][: N_IMAGES + 1]
        labels = torch.tensor(arrays["train_labels"][:N_IMAGES], dtype=torch.long)
    images = []
    for start, end in itertools.pairwise(offsets):
        with Image.open(io.BytesIO(encoded[start:end].tobytes())) as image:
            images.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
    return torch.stack(images).float(), labels


def _standardised(name: str, pixels: Tensor, labels: Tensor) -> Images:
    deviation, mean = torch.std_mean(pixels, dim=(0, 2, 3), keepdim=True)
    return Images(name, (pixels - mean) / deviation, labels)
