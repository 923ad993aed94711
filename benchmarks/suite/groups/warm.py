"""Compares adjoint solves that begin at zero with warm starts, which begin at the last step's g.

An IGNN is trained on one graph of chains, and on Cora if the folder of `--graphs` has `Cora/raw`.
Each contender trains a model of its own from the same weights, so the k-th run of each is the same
step. With dropout, the incoming gradient changes at random in each step, so the last g helps less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional as F

import deq_phantom_plugin as dpp
from deq_phantom_plugin.contract.state import State

from ..contest import Contender, Contest, Ratio, Settings, Unavailable
from ..timing import Run

STEPS = 10  # training steps per run
# The dropout, and the number of steps before the first run.
STAGES = ((0.0, 0), (0.0, 200), (0.5, 200))


@dataclass(frozen=True, repr=False)
class _Watched(dpp.GradStrategy):
    """A strategy that counts its vector-Jacobian products."""

    inner: dpp.GradStrategy
    products: list[int] = field(default_factory=list, hash=False)

    def attach(
        self, func: Callable[[State], State], equilibrium: State, context: dpp.Context
    ) -> State:
        monitor = lambda stats: self.products.append(stats.n_vjp)  # noqa: E731
        return self.inner.attach(func, equilibrium, replace(context, monitor=monitor))


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield one contest per graph, stage and tolerance."""
    try:
        import torch_geometric  # noqa: F401
    except ImportError:
        raise Unavailable("PyTorch Geometric is not installed") from None
    for graph, name in _graphs(settings):
        for dropout, before in STAGES:
            for tol in (1e-4,) if settings.quick else (1e-4, 1e-6):
                yield _contest(graph, name, dropout, before, tol, settings)


def _contest(
    graph: Any, name: str, dropout: float, before: int, tol: float, settings: Settings
) -> Contest:
    contenders = []
    for solver in ("gmres", "fixed_point"):
        for warm in (False, True):
            strategy = _Watched(dpp.get_strategy(_spec(solver, tol, warm)))
            contenders.append(
                Contender(
                    _spec(solver, tol, warm),
                    "ours",
                    lambda s=strategy: _training(graph, dropout, before, s, settings),
                    measure=lambda s=strategy: {"VJPs": sum(s.products) / len(s.products)},
                )
            )
    ratios = [
        Ratio(_spec(solver, tol, True), _spec(solver, tol, False))
        for solver in ("gmres", "fixed_point")
    ]
    title = (
        f"IGNN of one layer on {name}, dropout {dropout}: training steps from step {before} on, "
        f"adjoint to {tol:.0e}"
    )
    return Contest("warm", title, contenders, ratios, per_call=1 if settings.quick else STEPS)


def _spec(solver: str, tol: float, warm: bool) -> str:
    return f"ift(solver={solver!r}, tol={tol}, max_iter=200, warm_start={warm})"


def _training(
    graph: Any, dropout: float, before: int, strategy: _Watched, settings: Settings
) -> Run:
    """Return code that takes training steps, with the settings of the official code on Cora."""
    from deq_phantom_plugin.adapters.ignn import IGNN

    torch.manual_seed(0)
    x = graph.x.to(settings.device, settings.dtype)
    labels, chosen = graph.y.to(settings.device), graph.train_mask.to(settings.device)
    model = IGNN(x.shape[1], 16, int(labels.max()) + 1, 1, "node", strategy, dropout=dropout).to(x)
    edges = model.prepare(x, graph.edge_index.to(settings.device))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)

    def train(steps: int) -> None:
        for _ in range(1 if settings.quick else steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x, edges)[chosen], labels[chosen])
            loss.backward()
            optimizer.step()

    train(before)
    strategy.products.clear()
    return lambda: train(STEPS)


def _graphs(settings: Settings) -> Iterator[tuple[Any, str]]:
    from torch_geometric.data import Data

    length, number = (5, 2) if settings.quick else (50, 40)
    nodes = torch.arange(length * number)
    sources = nodes[(nodes + 1) % length != 0]
    labels = nodes // length % 2
    x = torch.zeros(len(nodes), 100)
    x[nodes % length == 0, labels[nodes % length == 0]] = 1
    chains = Data(x=x, y=labels, edge_index=torch.stack([sources, sources + 1]))
    chains.train_mask = torch.ones_like(labels, dtype=torch.bool)
    yield chains, f"{number} chains of {length} nodes"
    root = settings.graphs
    if root is not None and (root / "Cora" / "raw").is_dir():
        from torch_geometric.datasets import Planetoid

        yield Planetoid(str(root), "Cora")[0], "Cora"
