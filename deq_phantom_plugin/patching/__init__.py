"""Existing repositories switch gradient method by name: patched on disk, or as they are run.

What is imported here is all that patched code uses; the engine's files are imported by the command
line when it needs them.
"""

from .equilibrium import Equilibrium, default_grad, grad_argument, steps, switch, tell_step
from .loop import Loop

__all__ = [
    "Equilibrium",
    "Loop",
    "default_grad",
    "grad_argument",
    "steps",
    "switch",
    "tell_step",
]
