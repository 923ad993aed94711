"""Derivatives of attached states, and what is compared of them.

A graph is kept, so any number of derivatives can be taken of it. Compiled code is the exception: it
can be differentiated once only, so measurements stop before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


def vjp(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
    cotangents: Sequence[Tensor],
) -> list[Tensor]:
    """Return the gradients of <cotangents, outputs>; zeros where no gradient flows.

    The graph is kept.

    Args:
        outputs: tensors, some of them perhaps without a graph.
        inputs: the tensors and edges to differentiate with respect to. A gradient has to flow to
            each edge.
        cotangents: one tensor per output, of the same shape.
    """
    pairs = [(o, v) for o, v in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(place) for place in inputs if isinstance(place, Tensor)]
    return list(
        torch.autograd.grad(
            [output for output, _ in pairs],
            list(inputs),  # type: ignore[arg-type]  # it takes a mixture
            [v for _, v in pairs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def reached(outputs: Sequence[Tensor], params: Sequence[Tensor]) -> list[bool]:
    """Return for each parameter whether a gradient flows to it from any output.

    Raises:
        ValueError: if a gradient would flow through compiled code.
    """
    if short_of_compiled(outputs, params)[1]:
        raise ValueError(
            "a gradient reaches params through compiled code, which can be differentiated once "
            "only, and a measurement differentiates many times. Compute what func captures outside "
            "of torch.compile, or under torch.compiler.set_stance('force_eager')"
        )
    ends = [output for output in outputs if output.requires_grad]
    if not ends:
        return [False] * len(params)
    zeros = [torch.zeros_like(end) for end in ends]
    found = torch.autograd.grad(ends, list(params), zeros, retain_graph=True, allow_unused=True)
    return [grad is not None for grad in found]


def short_of_compiled(
    outputs: Sequence[Tensor], params: Sequence[Tensor]
) -> tuple[list[Tensor], list[GradientEdge]]:
    """Return where gradients end, on their way to the parameters, if they stop at compiled code.

    A compiled backward pass may overwrite what it needs, see `compilation.eager`. So it belongs to
    the training alone, and a measurement must stop before it.

    Args:
        outputs: where the gradients begin.
        params: the parameters.

    Returns:
        The parameters that are reached without compiled code; and the edges into compiled code
        through which other parameters are reached.
    """
    wanted = {id(param): param for param in params}
    reached: dict[int, Tensor] = {}
    edges: dict[Any, GradientEdge] = {}
    waiting = [(output.grad_fn, output.output_nr) for output in outputs]
    seen = set()
    while waiting:
        node, number = edge = waiting.pop()
        if node is None or edge in seen:
            continue
        seen.add(edge)
        if type(node).__name__ == "CompiledFunctionBackward":
            if any(id(leaf) in wanted for leaf in _leaves(node)):
                edges[edge] = GradientEdge(node, number)
            continue
        if id(leaf := getattr(node, "variable", None)) in wanted:
            reached[id(leaf)] = wanted[id(leaf)]
        waiting += node.next_functions
    return list(reached.values()), list(edges.values())


def _leaves(node: Any) -> Iterator[Tensor]:
    """Yield the leaf tensors that a node's gradient would reach."""
    waiting, seen = [node], {None, node}
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        following = {after for after, _ in node.next_functions} - seen
        seen |= following
        waiting += following


def as_vector(tensors: Sequence[Tensor]) -> Tensor:
    """Return all elements in one vector of float64, without a graph; complex numbers as pairs."""
    parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    return torch.cat([part.detach().to(parts[0].device, torch.float64).flatten() for part in parts])


def cosine(a: Tensor, b: Tensor, of_zero: float = math.nan) -> float:
    """Return the cosine of the angle between two vectors; `of_zero` if either is zero."""
    scale = float(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return float(a @ b) / scale if scale > 0 else of_zero


def relative_error(a: Tensor, reference: Tensor) -> float:
    """Return ||a - reference|| / ||reference||; NaN if the reference is zero."""
    scale = float(torch.linalg.vector_norm(reference))
    return float(torch.linalg.vector_norm(a - reference)) / scale if scale > 0 else math.nan


def check_params(params: Iterable[Tensor]) -> list[Tensor]:
    """Return parameters as a list, if all of them can be differentiated with respect to.

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
