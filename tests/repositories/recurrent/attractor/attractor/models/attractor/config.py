from dataclasses import dataclass
from typing import Literal, Optional

from attractor.models.base import Config


@dataclass
class AttractorConfig(Config):
    backward_type: Literal["onestep", "anderson", "picard"] = "onestep"
    backward_max_iter: Optional[int] = 40  # noqa: UP045
    backward_tol: float = 1e-4
    adjoint_grad_clip: Optional[float] = 1.0  # noqa: UP045
