"""An equilibrium as a differentiable function of what F captures, to any order.

What is differentiated: the x that solves x = G(x, a). x is a state of D elements in all, and a
stands for all tensors that G captures. v = dL/dx comes in, with the shapes of x.

1. The first derivative. Let J = dG/dx at x, of D x D elements, which is never formed. Let g, of
   the shapes of x, solve

       (I - J^T) g = v.

   Then dL/da = (dG/da)^T g, with the shapes of a. Both J^T w and (dG/da)^T g are backward passes
   through one graph of G(x, a) (`_gradient`).

2. The derivative of that. (dG/da)^T g is an ordinary function of a, x and g, whose derivative
   autograd finds. But x and g are solutions themselves. x is that of step 1. The system of step 1
   says

       g = v + J^T g,

   so that g is an equilibrium too: that of the map g -> v + J^T g, which captures (v, x, a)
   (`System.adjoint`). Step 1 holds for it as it stands.

3. Any further derivative is step 2 again. It solves one more system, which `System.inner` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._plumbing.cached_weights import made_anew
from .._plumbing.compilation import as_written, never_compiled
from .._plumbing.inference import refuse_in_inference_mode
from .._plumbing.lockstep import Lockstep, active, product_of_zeros
from .._plumbing.precision import AutocastState, full_precision
from .._plumbing.second_order import DoubleBackward
from .._plumbing.transforms import (
    carries_tangent,
    no_forward_mode,
    refuse_in_torch_func,
    sample_by_sample,
)
from ..contract.state import State, flatten, unflatten
from .captured import call_with, find_captured
from .linearization import in_format
from .repeats import Repeats

_METHOD = "ift(higher_order=True)"  # the strategy that is differentiated again

Leaves = Sequence[Tensor]
VJP = Callable[[Leaves], list[Tensor]]
AdjointSolve = Callable[[VJP, list[Tensor]], list[Tensor]]
"""From w -> J^T w and v to the g with (I - J^T) g = v; leaves in, leaves out."""


@dataclass(frozen=True, eq=False)
class System:
    """x = G(x, a), solved for x.

    Attributes:
        func: G, from the leaves of x and the tensors a to leaves like those of x.
        solve: solves the adjoint system, (I - J^T) g = v.
        inner: solves the systems behind it, see step 3 of the module's text.
        user: what asked for the gradient, such as a strategy. Errors name it.
        repeats: compares G(x, a) with its value in the forward pass; None for the systems behind
            the first.
        together: the other processes that solve it too, if there are any.
    """

    func: Callable[[Leaves, Leaves], list[Tensor]]
    solve: AdjointSolve
    inner: AdjointSolve
    user: object
    repeats: Repeats | None = None
    together: Lockstep | None = None

    def adjoint(self) -> System:
        """Return g = v + J^T g as a system for g. What its map captures is (v, x, a)."""
        inner, together = self.inner, self.together
        return System(self._adjoint_map, inner, inner, self.user, together=together)

    def _adjoint_map(self, g: Leaves, arguments: Leaves) -> list[Tensor]:
        n = len(g)
        v, x, rest = arguments[:n], arguments[n : 2 * n], arguments[2 * n :]
        inputs = _aliases(x)
        with (twice := DoubleBackward(_METHOD)):
            outputs = self.func(inputs, rest)
        images = _vjp(outputs, inputs, g, twice)
        return [vi + image for vi, image in zip(v, images, strict=True)]


@never_compiled
def implicit(
    func: Callable[[State], State],
    equilibrium: State,
    solve: AdjointSolve,
    inner: AdjointSolve,
    user: object,
) -> State:
    """Return F(h*) attached to all that F captures, by a gradient that can be differentiated again.

    The module's text derives it. An F that was compiled runs as it was written: compiled code has
    no second derivative, and does not tell what it captures.

    Costs one evaluation of F now, and one in each backward pass. A backward pass that is
    differentiated again costs two more for each system behind the first. Memory holds h* and what
    F captures, and no graph.

    Args:
        func: F, which must do the same each time.
        equilibrium: h*, detached.
        solve: solves the adjoint system of F.
        inner: solves the systems behind it.
        user: what asked for the gradient, such as a strategy. Errors name it.

    Raises:
        ValueError: if `func` captures a tensor in a way that cannot be seen.
        RuntimeError: inside a transform of `torch.func`, or in forward mode.
    """
    refuse_in_torch_func(user)
    refuse_in_inference_mode(user)
    func = as_written(func)
    leaves, structure = flatten(equilibrium)
    autocast = AutocastState(leaves)
    inputs = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.enable_grad(), made_anew():
        image, captured = find_captured(
            lambda: func(unflatten(inputs, structure)), lambda state: flatten(state)[0], inputs
        )
    images = flatten(image)[0]
    if carries_tangent([*captured, *images]):  # a tangent would be lost without a word
        raise no_forward_mode(user)
    values = [leaf.detach() for leaf in images]

    def explicit(x: Leaves, arguments: Leaves) -> list[Tensor]:
        replacements = {id(old): new for old, new in zip(captured, arguments, strict=True)}
        with autocast(), made_anew():
            state = call_with(lambda: func(unflatten(list(x), structure)), replacements)
        return flatten(state)[0]

    repeats = Repeats(user)
    repeats.see(0, values)
    system = System(explicit, solve, inner, user, repeats, active())
    attached = _Implicit.apply(system, len(leaves), *values, *leaves, *captured)
    return unflatten(list(attached), structure)


class _Implicit(torch.autograd.Function):
    """(values, x, a) -> values, whose gradient by a is that of the x that solves the system."""

    @staticmethod
    def forward(ctx: Any, system: System, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.system, ctx.n = system, n
        ctx.save_for_backward(*tensors[n:])
        return tuple(value.clone() for value in tensors[:n])

    @staticmethod
    @never_compiled
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2 + 2 * ctx.n :]
        saved = ctx.saved_tensors
        found = iter(
            sample_by_sample(lambda v: _gradient(ctx.system, ctx.n, saved, needed, v), grads)
        )
        parts = [next(found) if flag else None for flag in needed]
        return (None, None, *(None,) * (2 * ctx.n), *parts)


def _gradient(
    system: System, n: int, saved: Leaves, needed: Sequence[bool], v: Leaves
) -> list[Tensor]:
    """Return (dG/da)^T g for those of the tensors a that need it, steps 1 and 2.

    Args:
        system: the system that x solves.
        n: the number of leaves of x.
        saved: the n leaves of x, and then the tensors a.
        needed: for each of the tensors a, whether it needs a gradient.
        v: the leaves of dL/dx.
    """
    x, arguments = [leaf.detach() for leaf in saved[:n]], saved[n:]
    differentiable = torch.is_grad_enabled()
    v = [in_format(gradient, leaf) for gradient, leaf in zip(v, x, strict=True)]
    with torch.enable_grad():
        if differentiable:  # step 2: x is a function of a
            x = list(_Implicit.apply(system, n, *x, *x, *arguments))
        inputs, parameters = _aliases(x), _aliases(arguments)
        twice = DoubleBackward(_METHOD) if differentiable else None
    with system.together or nullcontext():
        with torch.enable_grad(), twice or nullcontext():
            outputs = system.func(inputs, parameters)
        if system.repeats is not None:
            system.repeats.see(0, outputs)
        with torch.no_grad(), full_precision(inputs[0].device):
            g = system.solve(_product(outputs, inputs), [leaf.detach() for leaf in v])
    if differentiable:  # step 2: g is a function of v, x and a
        g = list(_Implicit.apply(system.adjoint(), n, *g, *g, *v, *x, *arguments))
    wanted = [p for p, flag in zip(parameters, needed, strict=True) if flag]
    return _vjp(outputs, wanted, g, twice, zeros=False)


def _product(outputs: Leaves, inputs: Leaves) -> VJP:
    """Return w -> J^T w, which waits for the other processes where F communicates."""
    around = active()
    if around is None:
        return lambda w: _vjp(outputs, inputs, w)
    of_zeros = lambda: product_of_zeros(outputs, inputs)  # noqa: E731
    around.stands_in_by(of_zeros)
    return lambda w: around.multiply(lambda: _vjp(outputs, inputs, w), of_zeros)


def _aliases(tensors: Leaves) -> list[Tensor]:
    """Return the same tensors, as places where a backward pass ends.

    Those that have a graph keep it, so that a derivative of the gradient can go further back.
    """
    return [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors]


def _vjp(
    outputs: Leaves,
    inputs: Leaves,
    cotangents: Leaves,
    twice: DoubleBackward | None = None,
    zeros: bool = True,
) -> list[Tensor]:
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs or not inputs:
        return [torch.zeros_like(leaf) for leaf in inputs]
    images, v = [o for o, _ in pairs], [c for _, c in pairs]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": zeros}
    grad: Callable[..., Leaves] = torch.autograd.grad if twice is None else twice.grad
    return list(grad(images, inputs, v, **options))
