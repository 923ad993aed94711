"""Train one model once per gradient method, all else equal, and compare: `deq-phantom compare`."""

from .data import Dataset, load_digits, load_folder
from .report import table, write
from .training import MethodResult, Settings, compare

__all__ = [
    "Dataset",
    "MethodResult",
    "Settings",
    "compare",
    "load_digits",
    "load_folder",
    "table",
    "write",
]
