"""`SetStep`, a callback for a Transformers `Trainer`.

It passes the training step to all equilibria of the model, and saves their memories with each
checkpoint.
"""

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
    """Passes the step of a Transformers `Trainer` to every equilibrium, and saves their memories.

        Trainer(model, args, callbacks=[SetStep()], ...)

    Each checkpoint gets a file `deq_phantom_memory.pt` with `dpp.memory_state_dict`. A run that is
    resumed loads this file, so warm starts and histories continue. As with the Trainer's random
    state, each process has a file of its own. If a checkpoint has no such file, nothing is loaded.

    Args:
        checkpoint: the folder of the checkpoint from which a run is resumed. It is needed only if
            the folder is not in `args.output_dir`, since a Trainer does not pass the folder to its
            callbacks.
    """

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self.checkpoint = checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the memories of the checkpoint, see `dpp.load_memory_state_dict`."""
        folder = _folder(args, state) if self.checkpoint is None else Path(self.checkpoint)
        file = folder / _file(args)
        if state.global_step > 0 and file.is_file():
            saved = torch.load(file, map_location="cpu", weights_only=True)
            dpp.load_memory_state_dict(kwargs["model"], saved)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass the training step to the equilibria, see `dpp.set_step`."""
        total = state.max_steps if state.max_steps > 0 else None
        dpp.set_step(kwargs["model"], state.global_step, total=total)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the memories beside the checkpoint, see `dpp.memory_state_dict`."""
        folder = _folder(args, state)
        if folder.is_dir():  # a search for hyperparameters saves into folders of its own
            content = io.BytesIO()
            torch.save(dpp.memory_state_dict(kwargs["model"]), content)
            write_whole(folder / _file(args), content.getvalue())


def _folder(args: Any, state: Any) -> Path:
    """Return the folder of a Trainer's checkpoint at the current step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _file(args: Any) -> str:
    """Return the name of this process's file in a checkpoint."""
    rank = f"_{args.process_index}" if args.process_index else ""
    return f"deq_phantom_memory{rank}.pt"
