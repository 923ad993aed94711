from dataclasses import dataclass
from typing import Optional  # noqa: F401


class Config:
    pass


@dataclass
class RecurrentConfig(Config):
    n_embd: int = 4
    vocab_size: int = 5
    mean_recurrence: int = 6
    mean_backprop_depth: int = 2
    noise: float = 0.0
    lockstep_n: bool = False
    lockstep_k: bool = False
    activation_checkpoint_impl: str = "per-iteration"

    @property
    def checkpoint(self):
        from functools import partial

        from torch.utils.checkpoint import checkpoint

        return partial(checkpoint, use_reentrant=False)
