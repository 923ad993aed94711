"""The step of training and what equilibria remember, in a Transformers `Trainer`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.output import write_whole

__all__ = ["SetStep"]


class SetStep(TrainerCallback):
    """Tells every equilibrium the step of a Transformers `Trainer`, and keeps what it remembers.

    Trainer(model, args, callbacks=[SetStep()], ...)

    Each checkpoint gets a file `deq_phantom_memory.pt` with `dpp.memory_state_dict`, and a run that
    is resumed loads it: warm starts and histories go on. As with the Trainer's random state, each
    process has a file of its own. Where there is none, nothing is loaded.

    Args:
        checkpoint: the folder of the checkpoint that a run is resumed from, where it is not one of
            `args.output_dir`: a Trainer does not tell its callbacks.
    """

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self.checkpoint = checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `dpp.load_memory_state_dict`."""
        folder = _folder(args, state) if self.checkpoint is None else Path(self.checkpoint)
        file = folder / _file(args)
        if state.global_step > 0 and file.is_file():
            saved = torch.load(file, map_location="cpu", weights_only=True)
            dpp.load_memory_state_dict(kwargs["model"], saved)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `dpp.set_step`."""
        total = state.max_steps if state.max_steps > 0 else None
        dpp.set_step(kwargs["model"], state.global_step, total=total)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `dpp.memory_state_dict`."""
        folder = _folder(args, state)
        if folder.is_dir():  # a search for hyperparameters has its own
            content = io.BytesIO()
            torch.save(dpp.memory_state_dict(kwargs["model"]), content)
            write_whole(folder / _file(args), content.getvalue())


def _folder(args: Any, state: Any) -> Path:
    """Return where a Trainer has its checkpoint of a step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _file(args: Any) -> str:
    rank = f"_{args.process_index}" if args.process_index else ""
    return f"deq_phantom_memory{rank}.pt"
