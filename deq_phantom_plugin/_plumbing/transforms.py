"""Detects and supports `torch.func`, `vmap` and forward mode, besides ordinary backward passes.

These transforms run a model on tensors that stand for other tensors. Ordinary operations are right
there. Code that reads numbers or builds a graph of its own is not right there. Such code asks the
functions of this file where it runs, and then refuses, or takes another way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

R = TypeVar("R")

Leaves = list[Any]
"""One tensor per leaf of a state, or None where there is no gradient."""

Adjoint = Callable[[list[Tensor]], Leaves]
"""Maps the incoming gradient v to the g that is passed on to F, both with one tensor per leaf."""


def in_torch_func() -> bool:
    """Whether a transform of `torch.func` runs this code: vmap, grad, vjp, jvp, linearize, ...

    This is true under autograd's own vmap as well, see `sample_by_sample`.
    """
    if torch.compiler.is_compiling():  # the compiler traces the code as it is written
        return False
    if torch._C._are_functorch_transforms_active():  # `torch.autograd.Function.apply` asks this too
        return True
    return _is_traced() or _level_of_autograd() > 0  # `linearize` traces


def in_transform() -> bool:
    """Whether `torch.func` or forward mode runs this code: only ordinary operations are right."""
    return in_torch_func() or in_forward_mode()


def in_forward_mode() -> bool:
    """Whether forward mode is on; `torch.no_grad` does not switch it off."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _is_traced() -> bool:
    """Whether a tracer records this code, such as that of `linearize`."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def hides_numbers() -> bool:
    """Whether `torch.vmap` or `linearize` runs this code, so that no number can be read."""
    if torch.compiler.is_compiling():
        return False
    if _is_traced():
        return True
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


def carries_tangent(leaves: Sequence[Tensor]) -> bool:
    """Whether one of these tensors has a tangent of forward mode."""
    return in_forward_mode() and any(
        forward_ad.unpack_dual(leaf).tangent is not None for leaf in leaves
    )


def as_constants(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return copies that no transform and no mode differentiates; outside of them, the tensors.

    `torch.no_grad` does not suffice for a solve: tangents pass through it, and inside two
    transforms the graph of the outer one does.
    """
    if not (in_torch_func() or carries_tangent(leaves)):
        return list(leaves)
    return [_Constant.apply(leaf) for leaf in leaves]


def outside_vmap(solver: Callable[..., R]) -> Callable[..., R]:
    """Decorate a solver of (func, start, ...): its result is a constant in forward mode too.

    The decorated solver raises a `RuntimeError` under `torch.vmap` and `linearize`.
    """

    @functools.wraps(solver)
    def solve(func: Callable[[Any], Any], start: Any, **options: Any) -> R:
        if hides_numbers():
            raise RuntimeError(
                f"deq_phantom_plugin.forward.{solver.__name__} reads residuals to know when to "
                "stop, and torch.vmap and linearize hide these numbers. Iterate F a fixed number "
                "of times there instead, under torch.no_grad"
            )
        if not in_transform():
            return solver(func, start, **options)
        constant = functools.partial(tree_map_only, Tensor, lambda x: as_constants([x])[0])
        return solver(lambda state: constant(func(state)), constant(start), **options)

    return solve


def once_differentiable(tensor: Tensor, user: object) -> Tensor:
    """Return a copy of a tensor; a second derivative through the copy raises, in any mode.

    Args:
        tensor: the tensor that may be differentiated at most once.
        user: what cannot be differentiated twice, such as a strategy; for the error.
    """
    once: Tensor = _Once.apply(user, tensor)
    return once


def refuse_in_torch_func(user: object) -> None:
    """Raise an error inside a transform of `torch.func`, for code that is not right there.

    Args:
        user: what does not work there, such as a strategy; for the error.

    Raises:
        RuntimeError: if a transform of `torch.func` runs this code.
    """
    if in_torch_func():
        raise RuntimeError(
            f"{user} does not work inside torch.func (vmap, grad, vjp, jvp, jacrev, ...): it reads "
            "numbers that torch.func hides, and needs a graph of its own. Inside torch.func take "
            "upg, jfb, npg, bptt or exact, with a number as lam and without clip. Or do not use "
            "torch.func: torch.autograd.grad, also with is_grads_batched=True, and "
            "torch.autograd.functional are right with every strategy except reversible"
        )


def no_forward_mode(user: object) -> RuntimeError:
    """Return the error for code that has no forward mode; `user` names that code."""
    return RuntimeError(
        f"{user} has no forward mode (torch.func.jvp, torch.autograd.forward_ad), and the tangent "
        "would be lost silently. For forward mode take upg, jfb, npg without clip, bptt or exact; "
        "or take reverse mode, an ordinary backward pass"
    )


def no_second_derivative(user: object) -> RuntimeError:
    """Return the error for code that has first derivatives only; `user` names that code."""
    return RuntimeError(
        f"{user}: a second derivative was asked for (create_graph=True, or one transform inside "
        "another) through an equilibrium whose strategy gives first derivatives only. Its graph "
        "holds the equilibrium fixed, so the second derivative would be silently wrong. Take "
        "ift(higher_order=True) or bptt, which differentiate to any order."
    )


def sample_by_sample(adjoint: Adjoint, cotangents: Sequence[Tensor]) -> Leaves:
    """Return adjoint(cotangents), also where `vmap` passes a batch of cotangents at once.

    `is_grads_batched=True` and `jacobian(vectorize=True)` do so. Each cotangent of the batch then
    gets an adjoint solve of its own, which may read numbers.

    Args:
        adjoint: maps a cotangent v to g, see `Adjoint`.
        cotangents: the leaves of v.
    """
    if torch.compiler.is_compiling():
        return adjoint(list(cotangents))
    if torch._C._are_functorch_transforms_active():
        return list(_Each.apply(adjoint, *cotangents))
    # From here on: autograd's own vmap, whose batched tensors have private functions.
    dims = [0 if torch._C._functorch.is_legacy_batchedtensor(c) else None for c in cotangents]
    level = _level_of_autograd()
    if dims.count(0) == 0 and level == 0:
        return adjoint(list(cotangents))
    own = max(level, 1)  # in the threads of a GPU's backward pass the level reads 0
    whole = [
        c if dim is None else torch._remove_batch_dim(c, own, 1, 0)
        for c, dim in zip(cotangents, dims, strict=True)
    ]
    if level:
        torch._C._vmapmode_decrement_nesting()
    try:
        if dims.count(0) == 0:
            return sample_by_sample(adjoint, whole)
        found = _one_by_one(adjoint, whole, dims, whole[dims.index(0)].shape[0])
    finally:
        if level:
            torch._C._vmapmode_increment_nesting()
    return [None if f is None else torch._add_batch_dim(f, 0, own) for f in found]


def _level_of_autograd() -> int:
    """Return how many of autograd's own vmaps run this code; `torch.vmap` does not count here."""
    level: int = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def _one_by_one(
    adjoint: Adjoint, cotangents: Sequence[Tensor], dims: Sequence[int | None], size: int
) -> Leaves:
    """Return the adjoint of each of `size` batch entries, stacked along a new first dimension.

    Args:
        adjoint: maps a cotangent v to g, see `Adjoint`.
        cotangents: the leaves of v.
        dims: the batch dimension of each leaf; None for a leaf that all entries share.
        size: the length of the batch dimension.
    """
    found = []
    for index in range(size):
        one = [
            cotangent if dim is None else cotangent.select(dim, index)
            for cotangent, dim in zip(cotangents, dims, strict=True)
        ]
        found.append(sample_by_sample(adjoint, one))
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*found, strict=True)]


class _Constant(torch.autograd.Function):
    """A copy without derivatives, in both modes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> None:
        return None


class _Once(torch.autograd.Function):
    """The identity. Its derivative is `_Never`, so that it can be differentiated only once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(user: object, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[object, Tensor], output: Tensor) -> None:
        ctx.user, tensor = inputs
        ctx.save_for_backward(tensor)
        ctx.save_for_forward(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (tensor,) = ctx.saved_tensors
        return None, _Never.apply(ctx.user, grad, tensor)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        (tensor,) = ctx.saved_tensors
        tangent_out: Tensor = _Never.apply(ctx.user, tangent, tensor)
        return tangent_out


class _Never(torch.autograd.Function):
    """The identity on a first derivative; to differentiate it raises an error.

    Its argument `tensor` is the point at which the derivative was taken. So a derivative with
    respect to that point raises as well.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(user: object, derivative: Tensor, tensor: Tensor) -> Tensor:
        return derivative.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[object, Tensor, Tensor], output: Tensor) -> None:
        ctx.user = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise no_second_derivative(ctx.user)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        raise no_second_derivative(ctx.user)


class _Each(torch.autograd.Function):
    """An adjoint whose rule for `torch.vmap` takes the entries of the batch one by one."""

    @staticmethod
    def forward(adjoint: Adjoint, *cotangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(adjoint(list(cotangents)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], adjoint: Adjoint, *cotangents: Tensor
    ) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
        found = tuple(_one_by_one(adjoint, cotangents, in_dims[1:], info.batch_size))
        return found, tuple(None if tensor is None else 0 for tensor in found)
