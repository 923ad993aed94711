"""The host of TorchDEQ: `get_deq(grad="upg")`, `DEQSliced`, `DEQIndexing`, `--grad upg`.

Scripts hold references to TorchDEQ's classes and functions before the host is enabled. So the host
changes the methods of the classes, and the code inside of the function `add_deq_args`. An
equilibrium whose `grad` holds only integers runs TorchDEQ's own code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ..host import PatchingHost
from ..patches import Patches
from ..solve import Solve
from . import solvers
from .construct import add_deq_args, hook_init, install, strategies_of
from .core import n_equilibria
from .forward import hook_forward, hook_solve
from .observe import observe


class TorchDEQ(PatchingHost):
    """The hook into TorchDEQ 0.1."""

    name = "torchdeq"
    package = "torchdeq"
    known_versions = ("0.1",)
    pip = '"deq-phantom-plugin[torchdeq]"'
    in_eval = "told"  # then TorchDEQ's own gradients are attached in evaluation mode, too

    def patch(self, patches: Patches) -> None:
        """Hook TorchDEQ's two cores and its argument parser, and add our solvers to its table."""
        from torchdeq import core
        from torchdeq.utils import arg_utils

        patches.also(solvers.register())
        for cls in (core.DEQSliced, core.DEQIndexing):
            patches.replace(cls, "__init__", hook_init)
            patches.replace(cls, "forward", hook_forward)
            patches.replace(cls, "_solve_fixed_point", hook_solve)
        patches.replace_code(arg_utils.add_deq_args, add_deq_args)

    def acts_disabled(self, spec: Any) -> bool:
        """See `Host.acts_disabled`. A module holds what was set in itself."""
        return True

    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module is a `DEQSliced` or `DEQIndexing`."""
        core = sys.modules.get("torchdeq.core")
        return core is not None and isinstance(module, core.DEQSliced | core.DEQIndexing)

    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """See `Host.prepare_grad`."""
        settings = module.__dict__.get("_grad_settings", {})
        args = {**settings, **module.args.config}  # type: ignore[union-attr, dict-item]
        strategies = strategies_of(spec, args, n_equilibria(module), module.f_solver)

        def switch() -> None:
            install(module, strategies, args)

        return switch

    def observe(self, module: nn.Module, callback: Callable[[Solve], None]) -> Callable[[], None]:
        """See `Host.observe`."""
        return observe(module, callback)
