"""Existing repositories switch gradient method by name: patched on disk, or as they are run.

What is imported here is all that patched code uses; the engine's files are imported by the command
line when it needs them.
"""

from .equilibrium import Equilibrium, grad_argument, steps

__all__ = ["Equilibrium", "grad_argument", "steps"]
