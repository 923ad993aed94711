"""Backward-pass strategies, one file per method; importing this module registers them."""

from torch.serialization import add_safe_globals

from ..contract.failure import FailurePolicy
from .auto import Auto
from .bptt import BPTT
from .depth import Depth
from .exact import Exact
from .guard import Guard
from .ift import IFT
from .jfb import JFB
from .npg import NPG
from .npg_rr import NPGRR
from .ramp import Ramp
from .reversible import Reversible
from .schedule import Schedule
from .shine import SHINE
from .tbptt import TBPTT
from .upg import UPG

__all__ = [
    "BPTT",
    "IFT",
    "JFB",
    "NPG",
    "NPGRR",
    "SHINE",
    "TBPTT",
    "UPG",
    "Auto",
    "Exact",
    "Guard",
    "Ramp",
    "Reversible",
    "Schedule",
]

add_safe_globals([FailurePolicy, Depth])  # arguments of strategies
