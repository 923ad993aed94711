"""One graph of F at the equilibrium, vector-Jacobian products on it, and its way into autograd."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._plumbing.compilation import eager, never_compiled
from .._plumbing.inference import refuse_in_inference_mode
from .._plumbing.lockstep import active, product_of_zeros
from .._plumbing.precision import full_precision
from .._plumbing.transforms import (
    Adjoint,
    no_forward_mode,
    no_second_derivative,
    refuse_in_torch_func,
    sample_by_sample,
)
from ..contract.state import State, flatten, ordinary, unflatten
from .packing import Packing

# PyTorch before 2.8 cannot say which hooks are on top. There the stack of calls is asked.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

_ROUNDINGS = 8  # roundings of float32 that may be left of numbers that cancel


class Linearization:
    """F(h*) on one autograd graph, which gives J^T v as often as wanted.

    An F that was compiled runs as it was written here, see `compilation.eager`.

    Args:
        func: the map F.
        equilibrium: h*, detached. Leaves that were made in inference mode are copied.
        user: what asks for the graph, such as a strategy. Errors name it.

    Raises:
        RuntimeError: inside a transform of `torch.func`, or in inference mode.

    Attributes:
        inputs: the leaves of h* as they entered the graph.
        outputs: the leaves of F(h*).
        structure: the structure of the state.
    """

    @never_compiled
    def __init__(
        self,
        func: Callable[[State], State],
        equilibrium: State,
        user: object = "what linearises F",
    ) -> None:
        self._user, self._together = user, active()
        refuse_in_torch_func(user)
        refuse_in_inference_mode(user)  # J would look like zero
        leaves, self.structure = flatten(equilibrium)
        with torch.enable_grad(), _kept_from_checkpoint(), eager():
            anchor = torch.empty(0, requires_grad=True)
            self.inputs: list[Tensor] = list(_Input.apply(anchor, *map(ordinary, leaves)))
            self.outputs, _ = flatten(func(unflatten(self.inputs, self.structure)))
        self._differentiable = [i for i, out in enumerate(self.outputs) if out.requires_grad]
        if self._together is not None:
            self._together.stands_in_by(self._of_zeros())

    def vjp(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Return the leaves of J^T v, with J = dF/dh at h*. The graph stays.

        Args:
            cotangents: the leaves of v, of the shapes of the state's leaves.
        """
        if not self._differentiable:
            return [torch.zeros_like(leaf) for leaf in self.inputs]
        together = self._together
        if together is None or not together.is_on or together.busy:
            return self._product(cotangents)
        return together.multiply(lambda: self._product(cotangents), self._of_zeros())

    def _product(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(
                torch.autograd.grad(
                    [self.outputs[i] for i in self._differentiable],
                    self.inputs,
                    [cotangents[i] for i in self._differentiable],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )

    def _of_zeros(self) -> Callable[[], None]:
        outputs, inputs = self.outputs, self.inputs
        return lambda: product_of_zeros(outputs, inputs)

    def attach(self, values: Sequence[Tensor], adjoint: Adjoint) -> State:
        """Return `values`, copied, as a state whose gradient v reaches F's graph as adjoint(v).

        Nothing here refers to the result, so that the graph is freed with it.

        Args:
            values: the leaves of the state to return.
            adjoint: from the leaves of v to the leaves of g. It is called once per backward pass;
                where a pass brings several v, once for each of them.
        """
        inputs, together = self.inputs, self._together
        of_zeros = None if together is None else self._of_zeros()

        def formatted(v: list[Tensor]) -> list[Tensor]:
            with full_precision(inputs[0].device), together or contextlib.nullcontext():
                if together is not None and of_zeros is not None:
                    together.stands_in_by(of_zeros)
                return adjoint([in_format(vi, leaf) for vi, leaf in zip(v, inputs, strict=True)])

        attached = _Attach.apply(self._user, formatted, len(values), *values, *self.outputs)
        return unflatten(list(attached), self.structure)


def in_format(gradient: Tensor, like: Tensor) -> Tensor:
    """Return a gradient in the memory format of the state.

    The loss decides the layout of the gradient. (That of a sum is expanded from one number.) Every
    product with J^T would keep this layout, and a convolutional F in channels_last would be slow.
    """
    if gradient.stride() == like.stride():
        return gradient
    return torch.empty_like(like).copy_(gradient)


class _Input(torch.autograd.Function):
    """The equilibrium as it enters the graph: differentiable, but no leaf.

    A leaf would collect a `.grad` that nobody reads.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf.detach() for leaf in leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * (1 + len(grads))


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, user: object, adjoint: Adjoint, n: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.user, ctx.adjoint, ctx.n = user, adjoint, n
        return tuple(value.clone() for value in tensors[:n])

    @staticmethod
    @never_compiled
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise no_second_derivative(ctx.user)
        return (None, None, None, *(None,) * ctx.n, *sample_by_sample(ctx.adjoint, grads))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise no_forward_mode(ctx.user)


def mixes_samples(graph: Linearization, packing: Packing) -> bool:
    """Whether F mixes rows of a packing, which were said to be independent samples.

    1. Every row gets a word of n bits. For each bit one product J^T e is taken, of an e that is
       zero in all rows whose bit is not set. A number in one of these rows then comes from another
       sample.
    2. n / 2 bits of each word are set, so that no word covers another. So every pair of rows is
       parted in both directions (Sperner 1928; a completely separating system, Dickson 1969). That
       takes 7 products for 32 rows, and 10 for 252.
    3. Without mixing these rows are exactly zero, in any precision, except where numbers cancel, as
       in exp(x - x.max()) divided by its sum. So a row counts as mixed only if more than a few
       roundings of float32 reach it, relative to what it gets from itself.
    """
    if packing.rows < 2:
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    size = packing.rows, packing.columns
    probe = torch.randn(size, generator=generator, dtype=packing.dtype, device="cpu")
    probe, words = probe.to(packing.device), _words(packing.rows).to(packing.device)
    own = leaked = probe.new_zeros((packing.rows,))
    for word in words[:, :, None]:
        image = packing.pack(graph.vjp(packing.unpack(probe * word))).abs().sum(dim=1)
        own, leaked = own + image * word[:, 0], leaked + image * ~word[:, 0]
    rounding = _ROUNDINGS * min(torch.finfo(t).eps for t in (packing.dtype, torch.float32))
    return bool((leaked > rounding * own).any())


def _words(rows: int) -> Tensor:
    """Return a word per row, none of which covers another, shape (bits, rows)."""
    bits = next(n for n in itertools.count(2) if math.comb(n, n // 2) >= rows)
    words = torch.zeros(bits, rows, dtype=torch.bool, device="cpu")
    # The words in order, each from its number (combinatorial number system).
    number = torch.arange(rows, device="cpu")
    left = torch.full_like(number, bits // 2)
    for bit in reversed(range(bits)):
        without = torch.tensor([math.comb(bit, k) for k in range(bits // 2 + 1)], device="cpu")
        words[bit] = number >= without[left]
        number = torch.where(words[bit], number - without[left], number)
        left = left - words[bit].long()
    return words


def _kept_from_checkpoint() -> contextlib.AbstractContextManager[Any]:
    """Keep this graph's tensors out of a surrounding non-reentrant `torch.utils.checkpoint`.

    A checkpoint recomputes its whole region for every backward pass over the graph, and each
    vector-Jacobian product is such a pass. So tensors that are saved here are held as they are.
    """
    if not inside_checkpoint():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def inside_checkpoint() -> bool:
    """Whether a non-reentrant `torch.utils.checkpoint` is recording or recomputing here."""
    checkpoint = "torch.utils.checkpoint"
    if _top_hooks is not None:
        hooks = _top_hooks(True)
        return hooks is not None and getattr(hooks[0], "__module__", None) == checkpoint
    frame = sys._getframe()
    while (back := frame.f_back) is not None:
        frame = back
        if frame.f_globals.get("__name__") == checkpoint:
            return True
    return False
