"""Other libraries' layers in the place of TorchDEQ's module, so that all train one network.

They are those that the benchmarks compare with: silva-networks, with an environment of its own,
and phantom_grad, from a checkout in `.hosts`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adapters.mdeq.solve import residual_of

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

# By our names for them; k and lam are those of the paper's recipe, the products TINY.yaml's.
LAYERS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "phantom_grad": {"k": 5, "lam": 0.5},
        "silva-phantom": {"backward_mode": "phantom", "phantom_steps": 5, "phantom_tau": 0.5},
        "silva-neumann": {"backward_mode": "neumann", "neumann_terms": 5},
        "silva-shine": {"backward_mode": "shine"},
        "silva-implicit": {"backward_mode": "implicit", "backward_max_iter": 24},
    }
)


class Layer(nn.Module):
    """A layer whose residuals are measured in evaluation, which is not timed.

    Args:
        layer: of another library, from F and a start to states and what TorchDEQ tells of a solve.
    """

    indexing: tuple[int, ...] = (1,)  # TorchDEQ's; one state

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.memory = dpp.Memory()

    def forward(
        self, func: Callable[..., Any], start: list[Tensor]
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """Solve and attach."""
        states, info = self.layer(func, start)
        if not self.training:
            info = {"rel_lowest": residual_of(lambda state: list(func(*state)), states[-1])}
        return states, info


def layer(name: str, evaluations: int, network: nn.Module) -> Layer:
    """Return a layer of another library.

    Args:
        name: one of `LAYERS`.
        evaluations: of f that a solve may take, and one more, as TorchDEQ's Broyden counts them.
        network: f.

    Raises:
        ValueError: if it is unknown, or cannot be had here; says how to get it.
    """
    if name not in LAYERS:
        raise ValueError(f"layer={name!r}; expected torchdeq, or one of {', '.join(LAYERS)}")
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    from suite import contest, peers

    options = dict(LAYERS[name])
    try:
        if name == "phantom_grad":
            return Layer(peers.PhantomGrad(**options, updates=evaluations))
        solver = {"solver": "broyden", "max_iter": evaluations, "history": evaluations + 1}
        return Layer(peers.Silva(network.parameters(), **solver, **options))
    except contest.Unavailable as error:
        raise ValueError(f"layer={name!r}: {error}") from None
