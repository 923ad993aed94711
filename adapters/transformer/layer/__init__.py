"""Equilibrium blocks out of Transformers' own decoder layers, which work in the model around."""

from ..versions import CACHE
from .equilibrium import EquilibriumLayer, deq_from_layer

__all__ = ["CACHE", "EquilibriumLayer", "deq_from_layer"]
