"""Equilibrium layers of other libraries, for the comparison of libraries on one network.

They take the place of TorchDEQ's module in an MDEQ. The libraries are those of the benchmarks:
silva-networks, which has an environment of its own, and phantom_grad, from a checkout in `.hosts`.
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

# The settings of each layer, by our name for it. k and lam are those of the paper's recipe. The
# number of products is that of TINY.yaml.
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
    """A layer of another library, with the interface of TorchDEQ's module.

    The residual is measured in evaluation mode only, which is not timed.

    Args:
        layer: the layer. It takes F and a start, and returns states and a dict as TorchDEQ does.
    """

    indexing: tuple[int, ...] = (1,)  # as in TorchDEQ: one state is returned

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.memory = dpp.Memory()

    def forward(
        self, func: Callable[..., Any], start: list[Tensor]
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """Solve, attach the gradient, and return the states and a dict with the residual."""
        states, info = self.layer(func, start)
        if not self.training:
            info = {"rel_lowest": residual_of(lambda state: list(func(*state)), states[-1])}
        return states, info


def layer(name: str, evaluations: int, network: nn.Module) -> Layer:
    """Return a layer of another library.

    Args:
        name: one of `LAYERS`.
        evaluations: the largest number of evaluations of f in a solve. Like TorchDEQ's Broyden, a
            solve makes one more.
        network: f.

    Raises:
        ValueError: if the name is unknown, or if the library is missing; the message says how to
            get it.
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
