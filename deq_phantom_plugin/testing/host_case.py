"""A framework and a small model in it, as the suites need them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..hosts import Solve, find_equilibria


class HostCase:
    """A host, and how its framework is used; a subclass has a model and a loss.

    Attributes:
        name: the host's.
        missing: why the case cannot run here; empty if it can.
        own: a gradient that is the framework's own.
        patched: (module or class, attribute) pairs, the first as dotted names, that the host
            changes.
        remembers: whether a model that is made with a name has a memory.
        pickles: whether the framework's own models do.
        owns_solve: whether strategies that own the solve are taken.
        steps: of its loop, where that has a fixed length and its end is what observers see.
        calls: how often one evaluation of F calls the module inside.
        copies_observers: whether a copy of a model that is observed is observed as well.
        exact: an `ift` that is exact for the model.
        precision: of that one's gradient.
        channels: the size of dimension 1 inside F.
        width: the size of its last dimension.
    """

    name: ClassVar[str]
    missing: ClassVar[str] = ""
    own: ClassVar[Any] = None
    patched: ClassVar[tuple[tuple[str, str], ...]] = ()
    remembers: ClassVar[bool] = True
    pickles: ClassVar[bool] = True
    owns_solve: ClassVar[bool] = True
    steps: ClassVar[int | None] = None
    calls: ClassVar[int] = 1
    copies_observers: ClassVar[bool] = False
    exact: ClassVar[str] = "ift(tol=1e-12, max_iter=400)"
    precision: ClassVar[float] = 1e-8
    channels: ClassVar[int] = 5
    width: ClassVar[int] = 5

    def model(self, grad: Any, inside: nn.Module | None = None) -> nn.Module:
        """Return a model in float64, of the same weights each time, with a module inside F."""
        raise NotImplementedError

    def loss(self, model: nn.Module) -> Tensor:
        """Return a loss of the model in training, on the same data each time."""
        raise NotImplementedError

    def inside(self, kind: str) -> nn.Module:
        """Return a module for inside F that draws numbers or updates its buffers."""
        torch.manual_seed(1)
        if kind == "dropout":
            return nn.Dropout(0.3)
        if kind == "batch norm":
            return nn.BatchNorm1d(self.channels)
        return spectral_norm(nn.Linear(self.width, self.width))

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the gradient of every parameter that has one."""
        model.zero_grad()
        self.loss(model).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def solves(model: nn.Module, run: Callable[[], Any]) -> list[Solve]:
    """Return every solve that the equilibria of a model do in a run."""
    found: list[Solve] = []
    ends = [host.observe(module, found.append) for host, module in find_equilibria(model)]
    run()
    for end in ends:
        end()
    return found


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tol: float = 1e-9) -> None:
    """Compare gradients."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tol, atol=tol)


def bitwise(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Compare gradients, or whatever a model has, bit for bit."""
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def differs(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether gradients are not the same."""
    return any(not torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-9) for name in a)
