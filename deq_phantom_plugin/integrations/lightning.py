"""The step of training, the monitor, and what equilibria remember, in Lightning."""

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
"""The key of a checkpoint that has `dpp.memory_state_dict`."""


def _lightning() -> Any:
    """Return `lightning.pytorch`, or the same package by the name that is in use here."""
    new, old = "lightning.pytorch", "pytorch_lightning"
    in_use = old in sys.modules and new not in sys.modules
    only = is_there(old) and not is_there("lightning")
    if in_use or only:
        return require("pytorch_lightning", "lightning")
    return require("lightning.pytorch", "lightning")


class SetStep(_lightning().Callback):  # type: ignore[misc]
    """Tells every equilibrium the step of a Lightning `Trainer`, and keeps what it remembers.

        Trainer(callbacks=[SetStep(monitor=200)], ...)

    The step is that of the optimiser, `trainer.global_step`: the same in all batches whose
    gradients accumulate. It goes on where a checkpoint ended.

    Each checkpoint gets `dpp.memory_state_dict` of the process that writes it, and a `fit` that is
    resumed loads it: warm starts, histories and counts of failures go on in that process. The
    others take its histories, so that all choose alike, and start cold.

    Args:
        total: how many steps there will be; None for what the `Trainer` expects.
        monitor: steps from one log of `dpp.monitor` to the next, into all loggers of the `Trainer`;
            None for no monitor.

    Raises:
        ValueError: if `total` or `monitor` is not a whole number of at least 1; when training
            starts, if there is a monitor and no logger.
    """

    def __init__(self, *, total: int | None = None, monitor: int | None = None) -> None:
        super().__init__()
        self.total = None if total is None else positive_int("total", total)
        self.monitor = None if monitor is None else positive_int("monitor", monitor)
        self._expected: int | None = self.total
        self._monitor: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Tell what is known before finders of learning rates and batch sizes train."""
        # They call no callback but their own, and come before the data are there to be counted.
        there = any(isinstance(module, dpp.Memory) for module in pl_module.modules())
        if stage == "fit" and there:  # else the model is still to be configured
            most = trainer.max_steps if trainer.max_steps > 0 else None
            dpp.set_step(pl_module, trainer.global_step, total=self.total or most)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count the steps there will be, and start the monitor."""
        self._expected = self.total or _steps_of(trainer)
        if self.monitor is None:
            return
        if not trainer.loggers:
            raise ValueError(
                f"monitor={self.monitor} in a Trainer without a logger; expected a logger, or "
                "monitor=None"
            )

        def write(numbers: Mapping[str, float], step: int) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(dict(numbers), step)

        self._monitor = dpp.monitor(pl_module, write, self.monitor)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """See `dpp.set_step`."""
        dpp.set_step(pl_module, trainer.global_step, total=self._expected)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """See `dpp.memory_state_dict`."""
        checkpoint[MEMORY] = dpp.memory_state_dict(pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """See `dpp.load_memory_state_dict`."""
        saved = checkpoint.get(MEMORY)
        if saved is None or trainer.state.fn != "fit":  # evaluation needs none of it
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
        """End the monitor."""
        self.on_train_end(trainer, pl_module)


def _steps_of(trainer: Any) -> int | None:
    """Return how many steps a `Trainer` expects to take; None where it does not know."""
    most = trainer.max_steps if trainer.max_steps > 0 else None
    # By hand a batch may take any number of steps, and each of several optimisers counts.
    if not trainer.lightning_module.automatic_optimization:
        return most
    expected, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    if not 0 < expected < math.inf:
        return None
    for callback in trainer.callbacks:
        # A `GradientAccumulationScheduler`, of which the estimate knows the first epoch alone.
        at = getattr(callback, "get_accumulate_grad_batches", None)
        if at is not None and batches < math.inf and trainer.max_epochs > 0:
            steps = sum(math.ceil(batches / at(epoch)) for epoch in range(trainer.max_epochs))
            expected = min(steps, most or steps)
    return int(expected)
