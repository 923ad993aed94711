"""TorchDEQ takes strategies by name."""

from .host import TorchDEQ

__all__ = ["TorchDEQ"]
