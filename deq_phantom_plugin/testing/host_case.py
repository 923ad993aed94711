"""What a host's suite needs to know: a framework, and a small model in it.

Beside `HostCase` there are the comparisons of gradients that the suites share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..hosts import Solve, find_equilibria


class HostCase:
    """A host, and how its framework is used. A subclass defines `model` and `loss`.

    Attributes:
        name: the name of the host.
        missing: why the case cannot run here; empty if it can.
        own: the value of `grad` that stands for the framework's own gradient.
        patched: pairs of what the host changes: the dotted name of a module or class, and the name
            of an attribute.
        remembers: whether a model that is made with a name has a memory at once.
        pickles: whether models of the framework can be pickled.
        owns_solve: whether the host takes strategies that own the solve.
        steps: the number of evaluations, for a loop of a fixed length whose end is what observers
            see; None for a solve.
        calls: how often one evaluation of F calls the module inside.
        copies_observers: whether a copy of an observed model is observed as well.
        exact: the spec of an `ift` that is exact for the model.
        precision: the relative and absolute error that the gradient of `exact` may have.
        channels: the size of dimension 1 inside F.
        width: the size of the last dimension inside F.
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
        """Return a model in float64, with the same weights each time.

        Args:
            grad: the gradient method.
            inside: a module that F is to call; None for none.
        """
        raise NotImplementedError

    def loss(self, model: nn.Module) -> Tensor:
        """Return a loss of the model in training, on the same data each time."""
        raise NotImplementedError

    def inside(self, kind: str) -> nn.Module:
        """Return a module to be called in F, which draws numbers or updates its buffers.

        Args:
            kind: "dropout", "batch norm" or "spectral norm".
        """
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
    """Call a function, and return every solve that the equilibria of a model do in it."""
    found: list[Solve] = []
    ends = [host.observe(module, found.append) for host, module in find_equilibria(model)]
    run()
    for end in ends:
        end()
    return found


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tol: float = 1e-9) -> None:
    """Assert that two sets of gradients are the same, to a relative and absolute tolerance."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tol, atol=tol)


def bitwise(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Assert that two sets of gradients, or of other tensors, are the same bit for bit."""
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def differs(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of gradients differ by more than rounding."""
    return any(not torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-9) for name in a)
