"""Backward-pass strategies, one file a method."""

from .bptt import BPTT
from .exact import Exact
from .ift import IFT
from .jfb import JFB
from .npg import NPG
from .upg import UPG

__all__ = ["BPTT", "IFT", "JFB", "NPG", "UPG", "Exact"]
