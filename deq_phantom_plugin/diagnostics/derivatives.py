"""Derivatives of what a strategy attached, as many as wanted, and the tensors they are taken by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def vjp(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradients of <cotangents, outputs>; zero where none flows. The graph stays.

    Args:
        outputs: tensors, some of them perhaps without a graph.
        inputs: what to differentiate with respect to.
        cotangents: a tensor an output, of its shape.
    """
    pairs = [(o, v) for o, v in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return list(
        torch.autograd.grad(
            [output for output, _ in pairs],
            list(inputs),
            [v for _, v in pairs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def reached(outputs: Sequence[Tensor], params: Sequence[Tensor]) -> list[bool]:
    """Return for each parameter whether a gradient flows to it from any output."""
    ends = [output for output in outputs if output.requires_grad]
    if not ends:
        return [False] * len(params)
    zeros = [torch.zeros_like(end) for end in ends]
    found = torch.autograd.grad(ends, list(params), zeros, retain_graph=True, allow_unused=True)
    return [grad is not None for grad in found]


def as_vector(tensors: Sequence[Tensor]) -> Tensor:
    """Return all elements in one vector of float64, complex ones as pairs, without a graph."""
    parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    return torch.cat([part.detach().to(parts[0].device, torch.float64).flatten() for part in parts])


def check_params(params: Iterable[Tensor]) -> list[Tensor]:
    """Return parameters as a list.

    Raises:
        ValueError: if there are none, or one is not a tensor that requires grad.
    """
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise ValueError(
            f"params is a {type(params).__name__}; expected a sequence of tensors, such as [tensor]"
        )
    found = list(params)
    if not found:
        raise ValueError("params is empty; expected the tensors to differentiate with respect to")
    for index, param in enumerate(found):
        if not isinstance(param, Tensor):
            raise ValueError(f"params[{index}] is a {type(param).__name__}; expected a tensor")
        if not param.requires_grad:
            raise ValueError(
                f"params[{index}], of shape {tuple(param.shape)}, does not require grad; call "
                "requires_grad_() before F is built from it"
            )
    return found
