"""Switch the gradient method of a deep equilibrium model by name.

    import deq_phantom_plugin as dpp

    dpp.enable()                                     # TorchDEQ now takes names
    deq = torchdeq.get_deq(grad="upg(k=5, lam=0.5)")

or without any framework:

    eq = dpp.Equilibrium(grad="npg")                 # a module of the model
    h = eq(func, h0)
"""

from . import _moved
from .attach import attach
from .checkpoint import load_memory_state_dict, memory_state_dict
from .contract.errors import AssumptionWarning, ConvergenceError, ConvergenceWarning, NonFiniteError
from .contract.memory import Memory
from .contract.state import State
from .contract.strategy import BackwardStats, Context, GradStrategy
from .diagnostics import gradient_report, model_report, monitor, report_choice, tune
from .equilibrium import Equilibrium
from .forward import SampleStarts
from .hosts import disable, enable, enabled, register_host
from .jacobian import jacobian_reg, spectral_radius
from .loop import loop
from .regularization import JacobianRegularization
from .strategies import (
    BPTT,
    IFT,
    JFB,
    NPG,
    NPGRR,
    SHINE,
    TBPTT,
    UPG,
    Auto,
    Exact,
    Guard,
    Ramp,
    Reversible,
    Schedule,
)
from .strategies.registry import get_strategy, list_strategies, register_strategy
from .switch import failures, set_grad, set_step

__version__ = "0.1.0"

__all__ = [
    "BPTT",
    "IFT",
    "JFB",
    "NPG",
    "NPGRR",
    "SHINE",
    "TBPTT",
    "UPG",
    "AssumptionWarning",
    "Auto",
    "BackwardStats",
    "Context",
    "ConvergenceError",
    "ConvergenceWarning",
    "Equilibrium",
    "Exact",
    "GradStrategy",
    "Guard",
    "JacobianRegularization",
    "Memory",
    "NonFiniteError",
    "Ramp",
    "Reversible",
    "SampleStarts",
    "Schedule",
    "State",
    "attach",
    "disable",
    "enable",
    "enabled",
    "failures",
    "get_strategy",
    "gradient_report",
    "jacobian_reg",
    "list_strategies",
    "load_memory_state_dict",
    "loop",
    "memory_state_dict",
    "model_report",
    "monitor",
    "register_host",
    "register_strategy",
    "report_choice",
    "set_grad",
    "set_step",
    "spectral_radius",
    "tune",
]

_moved.install()
