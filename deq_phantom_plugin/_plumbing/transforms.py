"""PyTorch's other ways to differentiate: `torch.func`, `vmap` and forward mode.

They run a model on tensors that stand for others. Ordinary operations are right there; what reads
numbers, or builds a graph of its own, is not, and has to know where it is.
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
"""Tensors, or None where there is no gradient."""

Adjoint = Callable[[list[Tensor]], Leaves]
"""From the incoming gradient v, one tensor per leaf, to the g that is passed on to F."""


def in_torch_func() -> bool:
    """Whether a transform of `torch.func` runs this code: vmap, grad, vjp, jvp, linearize, ...

    So does autograd's own vmap, see `sample_by_sample`.
    """
    if torch.compiler.is_compiling():  # which traces the code as it is written
        return False
    if torch._C._are_functorch_transforms_active():  # as `torch.autograd.Function.apply` asks
        return True
    return _is_traced() or _level_of_autograd() > 0  # `linearize` traces


def in_transform() -> bool:
    """Whether that, or forward mode, runs this code: only ordinary operations are right."""
    return in_torch_func() or in_forward_mode()


def in_forward_mode() -> bool:
    """Whether forward mode is on, which `torch.no_grad` does not switch off."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _is_traced() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def hides_numbers() -> bool:
    """Whether `torch.vmap` or `linearize` runs this code, so that no number can be looked at."""
    if torch.compiler.is_compiling():
        return False
    if _is_traced():
        return True
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


def carries_tangent(leaves: Sequence[Tensor]) -> bool:
    """Whether forward mode follows one of these tensors."""
    return in_forward_mode() and any(
        forward_ad.unpack_dual(leaf).tangent is not None for leaf in leaves
    )


def as_constants(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors that no transform and no mode differentiates.

    A solve under `torch.no_grad` has tangents, and inside two transforms the outer one's graph.
    """
    if not (in_torch_func() or carries_tangent(leaves)):
        return list(leaves)
    return [_Constant.apply(leaf) for leaf in leaves]


def outside_vmap(solver: Callable[..., R]) -> Callable[..., R]:
    """Let a solver of (func, start, ...) find a state that is a constant of forward mode too.

    Raises:
        RuntimeError: where the solver is called under `torch.vmap`.
    """

    @functools.wraps(solver)
    def solve(func: Callable[[Any], Any], start: Any, **options: Any) -> R:
        if hides_numbers():
            raise RuntimeError(
                f"deq_phantom_plugin.forward.{solver.__name__} looks at residuals to know when to "
                "stop, and torch.vmap and linearize hide them; there iterate F a fixed number of "
                "times, under torch.no_grad"
            )
        if not in_transform():
            return solver(func, start, **options)
        constant = functools.partial(tree_map_only, Tensor, lambda x: as_constants([x])[0])
        return solver(lambda state: constant(func(state)), constant(start), **options)

    return solve


def once_differentiable(tensor: Tensor, user: object) -> Tensor:
    """Return the tensor; a second derivative through it, in any mode, raises.

    Args:
        tensor: what is to be differentiated once at most.
        user: whose limit that is, such as a strategy.
    """
    once: Tensor = _Once.apply(user, tensor)
    return once


def refuse_in_torch_func(user: object) -> None:
    """Refuse what is not right inside a transform of `torch.func`.

    Args:
        user: whose limit that is, such as a strategy.

    Raises:
        RuntimeError: inside one.
    """
    if in_torch_func():
        raise RuntimeError(
            f"{user} does not work inside torch.func (vmap, grad, vjp, jvp, jacrev, ...): it has "
            "to look at numbers that torch.func hides, and needs a graph of its own. Take upg, "
            "jfb, npg, bptt or exact there, with a lam that is a number and no clip; or stay "
            "outside: torch.autograd.grad, also with is_grads_batched=True, and "
            "torch.autograd.functional are right with every strategy but reversible"
        )


def no_forward_mode(user: object) -> RuntimeError:
    """Return the error of what has no forward mode."""
    return RuntimeError(
        f"{user} has no forward mode (torch.func.jvp, torch.autograd.forward_ad), and would lose "
        "the tangent; take upg, jfb, npg without clip, bptt or exact for that, or reverse mode"
    )


def no_second_derivative(user: object) -> RuntimeError:
    """Return the error of what has first derivatives only."""
    return RuntimeError(
        f"{user}: a second derivative was asked for (create_graph=True, or one transform inside "
        "another) through an equilibrium whose strategy gives first derivatives only: its graph "
        "holds the equilibrium fixed, so the second would be silently wrong. "
        "ift(higher_order=True) and bptt differentiate to any order."
    )


def sample_by_sample(adjoint: Adjoint, cotangents: Sequence[Tensor]) -> Leaves:
    """Return adjoint(cotangents), also where `vmap` hands many of them over at once.

    So it does for `is_grads_batched=True` and `jacobian(vectorize=True)`: each gets an adjoint
    solve of its own, which may look at its numbers.
    """
    if torch.compiler.is_compiling():
        return adjoint(list(cotangents))
    if torch._C._are_functorch_transforms_active():
        return list(_Each.apply(adjoint, *cotangents))
    dims = [0 if torch._C._functorch.is_legacy_batchedtensor(c) else None for c in cotangents]
    level = _level_of_autograd()
    if dims.count(0) == 0 and level == 0:
        return adjoint(list(cotangents))
    own = max(level, 1)  # threads of a GPU's backward pass are not told it
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
    """How many times `vmap` is around, as autograd itself nests it: another than that of users."""
    level: int = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def _one_by_one(
    adjoint: Adjoint, cotangents: Sequence[Tensor], dims: Sequence[int | None], size: int
) -> Leaves:
    """Return adjoint of each of `size` samples along a dimension of each tensor, stacked."""
    found = []
    for index in range(size):
        one = [
            cotangent if dim is None else cotangent.select(dim, index)
            for cotangent, dim in zip(cotangents, dims, strict=True)
        ]
        found.append(sample_by_sample(adjoint, one))
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*found, strict=True)]


class _Constant(torch.autograd.Function):
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
    """The identity, whose derivative is the identity, which has none."""

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
    """A first derivative, which depends on where it was taken, and has none itself."""

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
