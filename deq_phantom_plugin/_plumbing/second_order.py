"""Second derivatives of F: the kernel of attention that has them, and what has none."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel


class _Math(AbstractContextManager[None]):
    """`sdpa_kernel(SDPBackend.MATH)`, for as long as any thread is inside.

    The choice is one for all threads, and each would put back what it found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._choice: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._choice = sdpa_kernel(SDPBackend.MATH)
                self._choice.__enter__()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._choice is not None:
                choice, self._choice = self._choice, None
                choice.__exit__(None, None, None)


_math = _Math()


class DoubleBackward(AbstractContextManager["DoubleBackward"]):
    """A backward pass of F that is differentiated again later.

    Evaluate F inside a `with` block, where kernels are taken that can be differentiated twice: the
    fused ones of `scaled_dot_product_attention` cannot. For code that is never compiled.

    What cannot all the same fails in the second backward pass, in words that do not say what to do,
    and a custom function whose backward calls a kernel of its own is silently taken for a constant
    there. In place of both that pass gives an error.

    Args:
        method: what differentiates twice, for the error.
    """

    def __init__(self, method: str) -> None:
        self._method = method
        self._start = 0

    def __enter__(self) -> DoubleBackward:
        with torch.enable_grad():
            self._start = torch.empty(0, requires_grad=True).clone().grad_fn._sequence_nr()  # type: ignore[union-attr]
        _math.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        _math.__exit__(*error)

    def grad(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        **options: Any,
    ) -> list[Tensor]:
        """Return `torch.autograd.grad` of F's outputs, with a graph that is right or refuses."""
        custom = [
            node
            for node in graph_nodes(outputs)
            if isinstance(node, BackwardCFunction) and node._sequence_nr() >= self._start
        ]
        if custom:
            # A backward is linear in these. Where they require grad, and what a function makes of
            # them does not, that function has dropped its own derivative.
            cotangents = [v if v.requires_grad else v.detach().requires_grad_() for v in cotangents]
        lost: list[str] = []
        handles = [node.register_hook(_watch(node, lost)) for node in custom]
        try:
            found = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True, **options)
        finally:
            for handle in handles:
                handle.remove()
        obstacle = lost[0] if lost else _without_derivative(found)
        if obstacle is None:
            return list(found)
        message = (
            f"{self._method} differentiates F twice, and F has {obstacle}. For attention take a "
            "kernel that has one: attn_implementation='eager' in Transformers, or "
            "scaled_dot_product_attention with its MATH kernel, which is taken by itself unless F "
            "chooses another (torch.nn.attention.sdpa_kernel)"
        )
        # What has lost its graph altogether would be a constant in a loss.
        return [None if x is None else _Refused.apply(message, _with_graph(x)) for x in found]


def _watch(node: Any, lost: list[str]) -> Any:
    """Return a hook that notes a custom function whose backward drops its derivative."""

    def look(inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> None:
        if not any(v is not None and v.requires_grad for v in outputs):
            return
        dropped = (v for v in inputs if v is not None and not v.requires_grad)
        if any(bool(v.any()) for v in dropped):  # zeros have none
            name = node.name().removesuffix("Backward")
            lost.append(f"{name}, a custom function whose backward is not differentiable")

    return look


def _with_graph(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_()


class _Refused(torch.autograd.Function):
    """A number whose gradient is an error."""

    @staticmethod
    def forward(ctx: Any, message: str, x: Tensor) -> Tensor:
        ctx.message = message
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(ctx.message)


def _without_derivative(products: Iterable[Tensor | None]) -> str | None:
    """Say what in the graph of a backward pass has no derivative."""
    for node in graph_nodes([product for product in products if product is not None]):
        # What PyTorch puts where it has none; the error is raised when that is reached.
        if type(node).__name__ == "NotImplemented":
            return "a kernel that has no second derivative"
        if type(node).__name__ == "Error":
            return "a custom function that is marked once_differentiable"
    return None


def graph_nodes(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """Yield the nodes of autograd's graph that a backward pass from these tensors may reach."""
    waiting = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]
