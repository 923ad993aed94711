"""Lets existing repositories switch their gradient method by name.

`deq-phantom patch` changes the files of a repository; `deq-phantom run` changes its modules in
memory as they load. This package imports only what patched code calls. The command line imports
the engine (`patch`, `run`, `doctor`) when it needs it.
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
