"""The comparison behind `deq-phantom compare`: one training run per gradient method.

All runs share the initial weights, the order of the data and the solver. `compare` trains, `table`
prints the results, and `write` saves them.
"""

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
