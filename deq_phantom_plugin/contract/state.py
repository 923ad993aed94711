"""States of an equilibrium: a tensor, or any nesting of tuples, lists and dicts of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._plumbing.cached_weights import CachedWeights
from .._plumbing.lockstep import evaluated
from .._plumbing.trees import State, flatten, ordinary, unflatten
from .finite import check_finite

__all__ = [
    "CheckedFunc",
    "State",
    "check_equilibrium",
    "check_like",
    "damped_step",
    "flatten",
    "ordinary",
    "unflatten",
]


def check_equilibrium(equilibrium: State, finite: bool = True) -> None:
    """Refuse a state from which no strategy can start.

    Args:
        equilibrium: the state.
        finite: whether it must be finite, see `check_finite`.

    Raises:
        ValueError: if the state has no leaves, a leaf is not a floating-point or complex
            tensor, is nested, carries an autograd graph, or holds a NaN or an infinity.
    """
    leaves, _ = flatten(equilibrium)
    if not leaves:
        raise ValueError("the equilibrium has no tensors; expected at least one")
    for index, leaf in enumerate(leaves):
        where = f"leaf {index} of the equilibrium" if len(leaves) > 1 else "the equilibrium"
        if not isinstance(leaf, Tensor):
            raise ValueError(
                f"{where} is a {type(leaf).__name__}; a state is a tensor or any nesting of "
                "tuples, lists and dicts of tensors"
            )
        if leaf.is_nested:
            raise ValueError(
                f"{where} is a nested tensor, whose samples differ in shape: dpp.attach and its "
                "strategies take tensors of one shape. Pad it (torch.nested.to_padded_tensor) and "
                "mask in func what was padded"
            )
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise ValueError(f"{where} has dtype {leaf.dtype}; expected floating point or complex")
        if leaf.requires_grad:
            raise ValueError(
                f"{where} carries an autograd graph (requires_grad=True); solve it under "
                "torch.no_grad() or pass equilibrium.detach()"
            )
    if finite:
        check_finite(leaves)


class CheckedFunc:
    """A map that must return a state like the one it was given: structure, shapes and dtypes.

    Under autocast a map may return another dtype. It is cast back to that of the state.

    Args:
        func: the map.
        like: a state like those that the map is given.
        weights: the cached weights of earlier evaluations of this map, if there were any.

    Raises:
        ValueError: on a call whose result differs; or that changed its input in place, which
            backward reads again.
    """

    def __init__(
        self,
        func: Callable[[State], State],
        like: State,
        weights: CachedWeights | None = None,
    ) -> None:
        self._func = self.__wrapped__ = func
        leaves, self._structure = flatten(like)
        self._weights = weights or CachedWeights()
        self._like = [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]

    def __call__(self, state: State) -> State:
        """Evaluate the map, checked."""
        inputs, _ = flatten(state)
        # A compiler replaces operations in place, and inference tensors have no version.
        versions = []
        if not torch.compiler.is_compiling():
            versions = [None if leaf.is_inference() else leaf._version for leaf in inputs]
        result = evaluated(self._prepared, state)
        for leaf, version in zip(inputs, versions, strict=False):
            if version is not None and leaf._version != version:
                raise ValueError(
                    "func changed its input in place, and backward reads that input again; it must "
                    "return new tensors"
                )
        outputs, structure = flatten(result)
        if structure != self._structure:
            raise ValueError(
                f"func returned the structure {structure}, but was given {self._structure}; "
                "it must map a state to a state of the same structure, a dict with its keys in "
                "the same order"
            )
        for index, (output, (shape, dtype, device)) in enumerate(
            zip(outputs, self._like, strict=True)
        ):
            if _is_like(output, shape, dtype, device):
                continue
            where = f"leaf {index} of what func returned" if len(outputs) > 1 else "func's result"
            if not isinstance(output, Tensor):
                raise ValueError(f"{where} is a {type(output).__name__}; expected a tensor")
            if output.is_nested:
                raise ValueError(f"{where} is a nested tensor; expected one like the state's")
            if output.shape != shape:
                raise ValueError(
                    f"{where} has shape {tuple(output.shape)}, but the state has {tuple(shape)}"
                )
            if output.device != device:
                raise ValueError(f"{where} is on {output.device}, but the state is on {device}")
            if output.dtype != dtype:
                if not torch.is_autocast_enabled(device.type):
                    raise ValueError(
                        f"{where} has dtype {output.dtype}, but the state has {dtype}; only "
                        "under torch.autocast may they differ"
                    )
                outputs[index] = output.to(dtype)
        return unflatten(outputs, structure)

    def _prepared(self, state: State) -> State:
        return self._weights.evaluate(self._func, state)


def _is_like(output: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> bool:
    plain = type(output) is Tensor and not output.is_nested
    return plain and output.shape == shape and output.dtype == dtype and output.device == device


def check_like(solver: Any, result: Any, begin: State) -> None:
    """Refuse what a solver returned if it is no state like the initial one.

    Args:
        solver: the solver, for messages.
        result: what it returned.
        begin: the initial state.

    Raises:
        ValueError: if the structure, a shape or a dtype differs.
    """
    (leaves, got), (like, want) = flatten(result), flatten(begin)
    if got != want:
        raise ValueError(
            f"the solver {solver!r:.60} returned the structure {got}; expected that of the initial "
            f"state, {want}"
        )
    for leaf, model in zip(leaves, like, strict=True):
        found = (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf
        if found != (tuple(model.shape), model.dtype):
            raise ValueError(
                f"the solver {solver!r:.60} returned {found!r:.60}; expected a tensor of shape "
                f"{tuple(model.shape)}, {model.dtype}, as in the initial state"
            )


def damped_step(
    func: Callable[[State], State], state: State, lam: float | list[Tensor] = 1.0
) -> State:
    """Take one step h <- (1 - lam) h + lam F(h).

    Source: "On Training Implicit Models", supplement, algorithm 1.

    Args:
        func: the map F.
        state: h.
        lam: the damping factor: one number, or one tensor per leaf that broadcasts over the leaf.
    """
    image = func(state)
    if isinstance(lam, float | int) and lam == 1:
        return image
    old, structure = flatten(state)
    new, _ = flatten(image)
    factors: Sequence[Tensor | float] = lam if isinstance(lam, list) else [lam] * len(old)
    # lerp is one kernel and one allocation. The written-out sum would take three of each.
    return unflatten(
        [
            torch.lerp(h.to(f.dtype), f, factor)
            for h, f, factor in zip(old, new, factors, strict=True)
        ],
        structure,
    )
