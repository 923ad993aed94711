"""Turns Transformers' own decoder layers into equilibrium blocks that work in their models."""

from ..versions import CACHE
from .equilibrium import EquilibriumLayer, deq_from_layer

__all__ = ["CACHE", "EquilibriumLayer", "deq_from_layer"]
