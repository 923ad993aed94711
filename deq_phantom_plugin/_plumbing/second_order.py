"""Second derivatives of F: takes kernels that have them, and refuses operations that have none.

Most operations of PyTorch can be differentiated twice. The exceptions are fused kernels of
attention and some custom functions. `DoubleBackward` selects attention's MATH kernel, which can. It
finds what still cannot, and lets the second backward pass end with a clear error.
"""

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
    """Keeps `sdpa_kernel(SDPBackend.MATH)` for as long as any thread is inside.

    PyTorch has one choice for all threads. The first thread that enters makes it, and the last one
    that leaves restores it.
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
    """A backward pass of F that will be differentiated once more.

    Evaluate F inside the `with` block. There `scaled_dot_product_attention` takes its MATH kernel,
    since its fused kernels cannot be differentiated twice. Use it in code that is never compiled.

    If F holds an operation without a second derivative, the second backward pass raises an error
    that says what to do. PyTorch alone would raise an unclear error, or silently take the backward
    of a custom function for a constant.

    Args:
        method: the name of what differentiates twice, for the error.
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
        """Return `torch.autograd.grad` of F's outputs, to be differentiated once more.

        Args:
            outputs: the outputs of F.
            inputs: what to differentiate with respect to.
            cotangents: the incoming gradients, in the shapes of the outputs.
            **options: further options of `torch.autograd.grad`.

        Returns:
            One gradient per input. If F has an operation without a second derivative, a backward
            pass through these gradients raises a `RuntimeError`.
        """
        custom = [
            node
            for node in graph_nodes(outputs)
            if isinstance(node, BackwardCFunction) and node._sequence_nr() >= self._start
        ]
        if custom:
            # A backward function is linear in the cotangents. So if a cotangent requires grad and
            # the result of a function does not, that function has dropped its derivative.
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
            "kernel that has one: attn_implementation='eager' in Transformers, or the MATH kernel "
            "of scaled_dot_product_attention, which is the default here unless F chooses another "
            "kernel (torch.nn.attention.sdpa_kernel)"
        )
        # A gradient without any graph would count as a constant, so it gets a graph that raises.
        return [None if x is None else _Refused.apply(message, _with_graph(x)) for x in found]


def _watch(node: Any, lost: list[str]) -> Any:
    """Return a hook that notes a custom function whose backward drops its derivative."""

    def look(inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> None:
        if not any(v is not None and v.requires_grad for v in outputs):
            return
        dropped = (v for v in inputs if v is not None and not v.requires_grad)
        if any(bool(v.any()) for v in dropped):  # for zeros nothing is lost
            name = node.name().removesuffix("Backward")
            lost.append(f"{name}, a custom function whose backward is not differentiable")

    return look


def _with_graph(x: Tensor) -> Tensor:
    """Return a tensor that requires grad."""
    return x if x.requires_grad else x.detach().requires_grad_()


class _Refused(torch.autograd.Function):
    """The identity, whose backward pass raises an error."""

    @staticmethod
    def forward(ctx: Any, message: str, x: Tensor) -> Tensor:
        ctx.message = message
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(ctx.message)


def _without_derivative(products: Iterable[Tensor | None]) -> str | None:
    """Name an operation without a derivative in the graph of a backward pass; None if all have."""
    for node in graph_nodes([product for product in products if product is not None]):
        # PyTorch puts nodes of these names where there is no derivative. They raise when reached.
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
