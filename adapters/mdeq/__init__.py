"""Multiscale deep equilibrium image classifiers (MDEQ) on TorchDEQ, with a gradient by name.

Source: Bai, Koltun & Kolter, "Multiscale Deep Equilibrium Models", NeurIPS 2020, arXiv:2006.08656.
The state holds one feature map per resolution of the image. A single layer f has a residual block
for each resolution (Figure 2 of the paper), and then fuses each resolution into every other (its
Figure 1). All resolutions are solved together for one equilibrium of f.

    model = MDEQ.from_preset("tiny", grad="upg(k=5, lam=0.5)")
    cross_entropy(model(images), labels).backward()
    model.last.residual, model.last.nfe, model.spectral_radius()
"""

from typing import Any

from . import multiscale, stem_and_head
from .config import PRESETS, MDEQConfig
from .layers import VariationalDropout2d, WeightNormConv2d
from .model import MDEQ
from .solve import MDEQSolve

__all__ = ["MDEQ", "PRESETS", "MDEQConfig", "MDEQSolve", "VariationalDropout2d", "WeightNormConv2d"]


def __getattr__(name: str) -> Any:
    """Return a layer by its old private name; pickles of 0.1 look for it in this module."""
    for module in (multiscale, stem_and_head):
        for known in (name, name.removeprefix("_")):
            if name.startswith("_") and not name.startswith("__") and hasattr(module, known):
                return getattr(module, known)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
