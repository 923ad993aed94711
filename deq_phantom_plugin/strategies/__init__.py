"""Backward-pass strategies, one file a method."""

from .bptt import BPTT
from .exact import Exact
from .ift import IFT
from .jfb import JFB
from .npg import NPG
from .npg_rr import NPGRR
from .reversible import Reversible
from .shine import SHINE
from .upg import UPG

__all__ = ["BPTT", "IFT", "JFB", "NPG", "NPGRR", "SHINE", "UPG", "Exact", "Reversible"]
