"""A callback for Lightning's `Trainer`: training step, monitor and checkpoints of equilibria.

`SetStep` calls `dpp.set_step` in each batch and `dpp.monitor` if asked to. It saves and loads what
equilibria remember, through `dpp.memory_state_dict`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import deq_phantom_plugin as dpp

from .._plumbing.extras import is_there, require
from ..strategies.arguments import positive_int

__all__ = ["SetStep"]

MEMORY = "deq_phantom_memory"
"""The key of `dpp.memory_state_dict` in a checkpoint."""


def _lightning() -> Any:
    """Return `lightning.pytorch`, or `pytorch_lightning` if that one is in use or the only one."""
    new, old = "lightning.pytorch", "pytorch_lightning"
    in_use = old in sys.modules and new not in sys.modules
    only = is_there(old) and not is_there("lightning")
    if in_use or only:
        return require("pytorch_lightning", "lightning")
    return require("lightning.pytorch", "lightning")


class SetStep(_lightning().Callback):  # type: ignore[misc]
    """Tells every equilibrium the step of a Lightning `Trainer`, and saves what it remembers.

        Trainer(callbacks=[SetStep(monitor=200)], ...)

    The step is that of the optimiser, `trainer.global_step`. Batches whose gradients accumulate
    have the same step. After a checkpoint is loaded, the steps go on from there.

    Each checkpoint holds `dpp.memory_state_dict` of the process that writes it. When `fit` resumes,
    that process goes on with its warm starts, histories and counts of failures. The other processes
    load its histories only, so that all choose alike, and their warm starts begin anew.

    Args:
        total: the length of training in steps; None for what the `Trainer` expects.
        monitor: steps between two logs of `dpp.monitor`, which go to all loggers of the `Trainer`;
            None for no monitor.

    Raises:
        ValueError: if `total` or `monitor` is not a whole number of at least 1. If there is a
            monitor and no logger, it is raised when training starts.
    """

    def __init__(self, *, total: int | None = None, monitor: int | None = None) -> None:
        super().__init__()
        self.total = None if total is None else positive_int("total", total)
        self.monitor = None if monitor is None else positive_int("monitor", monitor)
        self._expected: int | None = self.total
        self._monitor: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Tell the step before Lightning's learning rate and batch size finders train."""
        # The finders call no callbacks of ours, and they run before the batches can be counted.
        there = any(isinstance(module, dpp.Memory) for module in pl_module.modules())
        if stage == "fit" and there:  # without a memory the model is not configured yet
            most = trainer.max_steps if trainer.max_steps > 0 else None
            dpp.set_step(pl_module, trainer.global_step, total=self.total or most)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the length of training, and start the monitor."""
        self._expected = self.total or _steps_of(trainer)
        if self.monitor is None:
            return
        if not trainer.loggers:
            raise ValueError(
                f"monitor={self.monitor} in a Trainer without a logger: the monitor's numbers "
                "would go nowhere. Give the Trainer a logger, or pass monitor=None"
            )

        def write(numbers: Mapping[str, float], step: int) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(dict(numbers), step)

        self._monitor = dpp.monitor(pl_module, write, self.monitor)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the step, see `dpp.set_step`."""
        dpp.set_step(pl_module, trainer.global_step, total=self._expected)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save what equilibria remember, see `dpp.memory_state_dict`."""
        checkpoint[MEMORY] = dpp.memory_state_dict(pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Load what equilibria remember when `fit` resumes, see `dpp.load_memory_state_dict`."""
        saved = checkpoint.get(MEMORY)
        if saved is None or trainer.state.fn != "fit":  # evaluation does not need it
            return
        if trainer.global_rank:
            saved = {name: {"histories": kept["histories"]} for name, kept in saved.items()}
        dpp.load_memory_state_dict(pl_module, saved)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the monitor."""
        if self._monitor is not None:
            self._monitor.remove()
            self._monitor = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End the monitor, as at the end of training."""
        self.on_train_end(trainer, pl_module)


def _steps_of(trainer: Any) -> int | None:
    """Return how many steps a `Trainer` expects to take; None if it does not know."""
    most = trainer.max_steps if trainer.max_steps > 0 else None
    # With manual optimisation a batch may take any number of steps, and those of all optimisers
    # count.
    if not trainer.lightning_module.automatic_optimization:
        return most
    expected, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    if not 0 < expected < math.inf:
        return None
    for callback in trainer.callbacks:
        # A `GradientAccumulationScheduler` may change the number of batches per step in each
        # epoch. Lightning's estimate uses that of the first epoch only.
        at = getattr(callback, "get_accumulate_grad_batches", None)
        if at is not None and batches < math.inf and trainer.max_epochs > 0:
            steps = sum(math.ceil(batches / at(epoch)) for epoch in range(trainer.max_epochs))
            expected = min(steps, most or steps)
    return int(expected)
