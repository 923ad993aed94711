"""Compares adjoint solves that begin at zero with warm starts, which begin at the last step's g.

An IGNN is trained on one graph of chains, and on Cora if the folder of `--graphs` has `Cora/raw`.
The weights before each step of this training are kept, and each contender computes the gradients of
the same steps. (Trainings of their own drift apart, and then solve systems of other difficulty.)
With dropout, the incoming gradient changes at random in each step, so the last g helps less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
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
            training = _Training(graph, dropout, before, settings)
            for tol in (1e-4,) if settings.quick else (1e-4, 1e-6):
                yield _contest(training, name, tol, settings)


def _contest(training: _Training, name: str, tol: float, settings: Settings) -> Contest:
    contenders = []
    for solver in ("gmres", "fixed_point"):
        for warm in (False, True):
            strategy = _Watched(dpp.get_strategy(_spec(solver, tol, warm)))
            contenders.append(
                Contender(
                    _spec(solver, tol, warm),
                    "ours",
                    lambda s=strategy: training.replayed(s),
                    measure=lambda s=strategy: {"VJPs": sum(s.products) / len(s.products)},
                )
            )
    ratios = [
        Ratio(_spec(solver, tol, True), _spec(solver, tol, False))
        for solver in ("gmres", "fixed_point")
    ]
    title = (
        f"IGNN of one layer on {name}, dropout {training.dropout}: training steps from step "
        f"{training.before} on, adjoint to {tol:.0e}"
    )
    return Contest("warm", title, contenders, ratios, per_call=training.per_run)


def _spec(solver: str, tol: float, warm: bool) -> str:
    return f"ift(solver={solver!r}, tol={tol}, max_iter=200, warm_start={warm})"


class _Training:
    """A training, with the settings of the official code on Cora, whose steps can be replayed.

    Args:
        graph: the graph, whose nodes are classified.
        dropout: the dropout before the last linear layer.
        before: the number of steps before those that are replayed.
        settings: the settings of the suite.

    Attributes:
        per_run: the number of steps that one run replays.
    """

    def __init__(self, graph: Any, dropout: float, before: int, settings: Settings) -> None:
        self.dropout, self.before = dropout, before
        self.per_run = 1 if settings.quick else STEPS
        self._x = graph.x.to(settings.device, settings.dtype)
        self._edges = graph.edge_index.to(settings.device)
        self._labels, self._chosen = graph.y.to(settings.device), graph.train_mask
        model, loss = self._made(dpp.IFT(tol=1e-6, max_iter=200))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
        # A contest has up to two runs before its rounds.
        kept = self.per_run * (settings.repeats + 2)
        self._weights: list[list[Tensor]] = []
        for step in range((0 if settings.quick else before) + kept):
            self._weights.append([p.detach().clone() for p in model.parameters()])
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        self._weights = self._weights[-kept:]

    def _made(self, strategy: dpp.GradStrategy) -> tuple[Any, Callable[[], Tensor]]:
        """Return a new model, and its loss on the graph."""
        from deq_phantom_plugin.adapters.ignn import IGNN

        torch.manual_seed(0)
        sizes = (self._x.shape[1], 16, int(self._labels.max()) + 1)
        model = IGNN(*sizes, 1, "node", strategy, dropout=self.dropout).to(self._x)
        edges = model.prepare(self._x, self._edges)

        def loss() -> Tensor:
            scores = model(self._x, edges)[self._chosen]
            return F.cross_entropy(scores, self._labels[self._chosen])

        return model, loss

    def replayed(self, strategy: _Watched) -> Run:
        """Return code that computes the gradients of the next steps with a strategy."""
        model, loss = self._made(strategy)
        steps = iter(enumerate(self._weights))

        def run() -> None:
            for step, weights in islice(steps, self.per_run):
                with torch.no_grad():
                    for parameter, kept in zip(model.parameters(), weights, strict=True):
                        parameter.copy_(kept)
                torch.manual_seed(step)
                model.zero_grad()
                loss().backward()

        return run


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
