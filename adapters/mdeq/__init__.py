"""Multiscale deep equilibrium image classifiers (MDEQ) on TorchDEQ, the gradient chosen by name.

Bai, Koltun & Kolter, "Multiscale Deep Equilibrium Models", NeurIPS 2020, arXiv:2006.08656. All
resolutions of an image are driven to one joint equilibrium of a single layer f (its Figure 1): a
residual block for each (its Figure 2), then each is fused into every other.

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
    """Find the layers of a whole model that 0.1 has pickled, when they were private and here."""
    for module in (multiscale, stem_and_head):
        for known in (name, name.removeprefix("_")):
            if name.startswith("_") and not name.startswith("__") and hasattr(module, known):
                return getattr(module, known)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
