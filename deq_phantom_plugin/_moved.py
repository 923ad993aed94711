"""Where modules of 0.1 have gone: their old paths work, and say the new one."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from typing import Any

from torch.serialization import add_safe_globals

PACKAGE = __name__.rpartition(".")[0]

# Old module -> where its names are now, looked for in this order; one that is still there, and has
# lost some, asks for these alone.
MOVED: dict[str, tuple[str, ...]] = {
    "adapters.around_layer": (
        "adapters.transformer.layer.around",
        "adapters.transformer.layer.masks",
        "adapters.transformer.layer",
    ),
    "adapters.deq_layer": ("adapters.transformer.layer",),
    "adapters.equilibrium": ("adapters.transformer.solve",),
    "adapters.graph": ("adapters.ignn.graph",),
    "adapters.graph_layer": ("adapters.ignn.layer",),
    "adapters.ignn_host": ("hosts.ignn",),
    "adapters.label_smoothing": ("adapters.transformer.label_smoothing",),
    "adapters.perron": ("adapters.ignn.perron",),
    "adapters.transformer_block": ("adapters.transformer.block",),
    "adapters.transformer_inputs": ("adapters.transformer.inputs",),
    "attaching": ("hosts.attaching",),
    "buffers": ("_plumbing.buffers",),
    "cached_weights": ("_plumbing.cached_weights",),
    "calls": ("_plumbing.calls",),
    "compilation": ("_plumbing.compilation",),
    "diagnostics.ascent": ("diagnostics.measure.ascent",),
    "diagnostics.cost": ("diagnostics.measure.cost",),
    "diagnostics.derivatives": ("diagnostics.measure.derivatives",),
    "diagnostics.equilibria": ("diagnostics.measure.equilibria",),
    "diagnostics.html": ("diagnostics.show.html", "diagnostics.show.figures"),
    "diagnostics.problem": ("diagnostics.measure.problem",),
    "diagnostics.recommendation": ("diagnostics.show.recommendation",),
    "diagnostics.render": ("diagnostics.show.text",),
    "entry_points": ("_plumbing.entry_points",),
    "errors": ("contract.errors", "_plumbing.once"),
    "evaluation": ("hosts.evaluation",),
    "extras": ("_plumbing.extras",),
    "failure": ("contract.failure",),
    "guard": ("strategies.guard",),
    "hosts.host": ("hosts.solve",),
    "hosts.torchdeq_form": ("hosts.torchdeq.form",),
    "hosts.torchdeq_solvers": ("hosts.torchdeq.solvers",),
    "late_read": ("_plumbing.late_read",),
    "memory": ("contract.memory",),
    "output": ("_plumbing.output",),
    "precision": ("_plumbing.precision",),
    "registry": ("strategies.registry",),
    "schedule": ("strategies.schedule",),
    "second_order": ("_plumbing.second_order",),
    "state": ("contract.state",),
    "strategy": ("contract.strategy",),
    "transforms": ("_plumbing.transforms",),
    "trial": ("_plumbing.trial",),
}

# Classes that files hold under their old names; `torch.load(weights_only=True)` goes by these.
SAVED = {
    "failure": ["FailurePolicy"],
    "guard": ["Guard"],
    "schedule": ["Schedule"],
}


class Moved(types.ModuleType):
    """An old module: hands out what is elsewhere now, with a `DeprecationWarning` by name."""

    def __init__(self, old: str, new: tuple[str, ...]) -> None:
        super().__init__(f"{PACKAGE}.{old}", f"Moved to {' and '.join(new)}.")
        self.__new = new

    def __getattr__(self, name: str) -> Any:
        for new in () if name.startswith("__") else self.__new:
            path = f"{PACKAGE}.{new}"
            module = importlib.import_module(path)
            if hasattr(module, name):
                old = self.__name__
                text = f"{old}.{name} has moved: import it from {path}"
                warnings.warn(text, DeprecationWarning, stacklevel=2)
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def install() -> None:
    """Make the old paths importable, and what was saved under them loadable."""
    for old, new in MOVED.items():
        module = Moved(old, new)
        if there := sys.modules.get(module.__name__):
            vars(there)["__getattr__"] = module.__getattr__
            continue
        sys.modules[module.__name__] = module
        parent, _, name = module.__name__.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], name, module)
    for old, names in SAVED.items():
        now = importlib.import_module(f"{PACKAGE}.{MOVED[old][0]}")
        add_safe_globals([(getattr(now, name), f"{PACKAGE}.{old}.{name}") for name in names])
