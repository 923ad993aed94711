"""The host of TorchDEQ, by which its constructors take strategies by name."""

from .entries import Entry, HostGrad, ProduceGrad, ProduceSteps
from .host import TorchDEQ

__all__ = ["Entry", "HostGrad", "ProduceGrad", "ProduceSteps", "TorchDEQ"]
