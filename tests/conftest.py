"""Equilibria drawn at random, with everything known about them."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import deq_phantom_plugin as dpp
from deq_phantom_plugin import registry

# Everything here is small, and tests run side by side.
torch.set_num_threads(int(os.environ.get("DEQ_PHANTOM_TEST_THREADS", "1")))

settings.register_profile(
    "default",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")


def load_example(name: str) -> Any:
    """Return examples/<name>.py as a module."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _isolated():
    """Every test starts from the same seed, and leaves no host enabled and no strategy behind."""
    torch.manual_seed(0)
    registered = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(registered)
    dpp.disable()


@dataclass
class Equilibrium:
    """h* = F(h*) for a smooth contraction on a state of any structure.

    `params` are the tensors that F captures: shared by all samples, and an injection for each.
    """

    func: Callable[[Any], Any]
    state: Any
    params: list[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return tree_flatten(self.state)[0]

    def probe(self, attached: Any) -> Tensor:
        """A loss that weighs every element differently and is nonlinear in it."""
        total = torch.zeros((), dtype=torch.float64)
        for leaf in tree_flatten(attached)[0]:
            weight = torch.linspace(-1, 2, max(leaf.numel(), 1), dtype=leaf.dtype)[: leaf.numel()]
            total = total + (weight.view(leaf.shape) * leaf.square()).sum()
        return total

    def gradient(self, spec: Any, context: dpp.Context | None = None, start: Any = None) -> Tensor:
        """The gradient of the loss with respect to all parameters, as one vector."""
        attached = dpp.attach(
            self.func, self.state if start is None else start, grad=spec, context=context
        )
        grads = torch.autograd.grad(self.linear_loss(attached), self.params)
        return torch.cat([grad.flatten() for grad in grads])

    def linear_loss(self, attached: Any) -> Tensor:
        """A loss whose gradient v does not depend on the value, so that methods can be compared."""
        return sum(
            (torch.linspace(-1, 2, leaf.numel(), dtype=leaf.dtype).view(leaf.shape) * leaf).sum()
            for leaf in tree_flatten(attached)[0]
        )

    def jacobian(self) -> Tensor:
        """The dense Jacobian of all elements, rows are outputs, from autograd's own routine."""
        leaves, structure = tree_flatten(self.state)
        sizes = [leaf.numel() for leaf in leaves]

        def flat(vector: Tensor) -> Tensor:
            parts = [
                p.view(leaf.shape) for p, leaf in zip(vector.split(sizes), leaves, strict=True)
            ]
            out = self.func(tree_unflatten(parts, structure))
            return torch.cat([leaf.flatten() for leaf in tree_flatten(out)[0]])

        point = torch.cat([leaf.flatten() for leaf in leaves])
        return torch.autograd.functional.jacobian(flat, point)


def make_equilibrium(
    shapes: list[tuple[int, ...]],
    nest: Callable[[list[Tensor]], Any] = lambda leaves: leaves[0],
    *,
    seed: int = 0,
    norm: float = 0.8,
    coupled: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Equilibrium:
    """Build tanh(W h + u), with ||W||_2 = norm, over all leaves together.

    Args:
        shapes: of the leaves, with the batch first unless coupled.
        nest: from leaves to the state.
        seed: of the random numbers.
        norm: of W, so at least the Lipschitz constant.
        coupled: whether W also mixes samples.
        dtype: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = 1 if coupled else shapes[0][0]
    sizes = [int(torch.Size(shape).numel() / batch) for shape in shapes]
    total = sum(sizes)
    weight = torch.randn(total, total, generator=generator, dtype=torch.float64)
    weight *= norm / torch.linalg.matrix_norm(weight, 2)
    weight = weight.to(dtype).requires_grad_()
    inject = torch.randn(batch, total, generator=generator, dtype=torch.float64)
    inject = inject.to(dtype).requires_grad_()
    structure = tree_flatten(nest([torch.empty(shape) for shape in shapes]))[1]

    def func(state: Any) -> Any:
        leaves = tree_flatten(state)[0]
        rows = torch.cat([leaf.reshape(batch, -1) for leaf in leaves], dim=1)
        out = torch.tanh(rows @ weight.mT + inject)
        parts = [p.reshape(s) for p, s in zip(out.split(sizes, dim=1), shapes, strict=True)]
        return tree_unflatten(parts, structure)

    state = tree_unflatten([torch.zeros(shape, dtype=dtype) for shape in shapes], structure)
    with torch.no_grad():
        for _ in range(2000):
            state, old = func(state), state
            pairs = zip(tree_flatten(state)[0], tree_flatten(old)[0], strict=True)
            if all(torch.allclose(a, b, rtol=2 * torch.finfo(dtype).eps, atol=0) for a, b in pairs):
                break
    return Equilibrium(func, state, [weight, inject])


NESTINGS: list[tuple[str, int, Callable[[list[Tensor]], Any]]] = [
    ("tensor", 1, lambda x: x[0]),
    ("list", 2, list),
    ("tuple", 2, tuple),
    ("dict", 2, lambda x: {"a": x[0], "b": x[1]}),
    ("nested", 3, lambda x: {"a": (x[0],), "b": [x[1], {"c": x[2]}]}),
]


@st.composite
def equilibria(draw: st.DrawFn, coupled: bool | None = None) -> tuple[Equilibrium, dpp.Context]:
    """Maps, shapes and nestings at random, with the context that fits."""
    _, n_leaves, nest = draw(st.sampled_from(NESTINGS))
    batch = draw(st.integers(1, 3))
    rest = st.lists(st.integers(1, 3), min_size=0, max_size=3).map(tuple)
    shapes = [(batch, *draw(rest)) for _ in range(n_leaves)]
    mixed = draw(st.booleans()) if coupled is None else coupled
    equilibrium = make_equilibrium(
        shapes,
        nest,
        seed=draw(st.integers(0, 2**31)),
        norm=draw(st.floats(0.1, 0.9)),
        coupled=mixed,
    )
    return equilibrium, dpp.Context(batch_dim=None if mixed else 0)


@pytest.fixture
def no_gc():
    """Switch the cyclic garbage collector off, so that only reference counts free memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
