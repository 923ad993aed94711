"""How far a gradient is off because states were recovered, and not kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._plumbing.sketch import Sketch

_FLOOR = 1e-6  # a leaf smaller than this, against the whole state, counts as that large


class Loss(NamedTuple):
    """What is known about a backward pass when it has come to the start.

    Attributes:
        error: an estimate of the gradient's error, relative to the norm of the gradient.
        changed: the largest relative difference between two images of the very same state. It is
            zero where F is deterministic.
        finite: whether all recovered states are finite.
    """

    error: float
    changed: float
    finite: bool


class Drift:
    """Follows how far recovered states are off, and estimates the gradient's error from that.

    The iteration is w_n = (1 - beta) w_(n-2) + beta F(w_(n-1)). The estimate, step by step:

    1. Backward repeats evaluation n at a recovered state in place of w_(n-1). Let d_n be the
       relative error of that state, or of its image, whichever is larger.
    2. The repeated evaluation contributes another share to the gradient, and passes on another
       cotangent. Both are off by about s(d_n) of their size. Here s(d) = sqrt(d), since F passes a
       share d of its kinks (relu, max, clamp) on the wrong side; and s(d) = d where d > 1.
    3. The error of a cotangent stays in all evaluations that backward comes to later. So, with the
       norms of the cotangents of F's images as weights,

        error  =  sum_n ||cotangent_n|| (s(d_n) + s(d_(n+1)) + ... + s(d_last)) / sum_n ||...||

    A smooth F loses about d_n and not its root, so that the estimate is then far above the truth.
    It is meant to find errors of percents. The device is read once per backward pass.

    Args:
        start: the leaves of w_0 = w_(-1).
        beta: the relaxation factor.
    """

    def __init__(self, start: Sequence[Tensor], beta: float) -> None:
        self.sketch = Sketch(start)
        self._beta = beta
        first = self.sketch(start)
        self._true = [first, first]  # of w_(-1), w_0, ...
        self._repeated: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._weights: dict[int, list[Tensor]] = {}

    def keep(self, leaves: Sequence[Tensor]) -> Tensor:
        """Take note of the next w_n; return its sketch."""
        self._true.append(self.sketch(leaves))
        return self._true[-1]

    def true(self, number: int) -> Tensor:
        """Return the sketch of w_n as it was."""
        return self._true[number + 1]

    @torch.no_grad()
    def weigh(self, number: int, cotangent: Tensor | None) -> None:
        """Take note of the cotangent of a leaf of F's image in evaluation n. It is a hook."""
        if cotangent is None:  # no gradient came, and a custom function passed that on
            return
        # A norm in half precision would overflow where gradients are scaled.
        wide = torch.promote_types(cotangent.dtype, torch.float32)
        norm = torch.linalg.vector_norm(cotangent.detach(), dtype=wide)
        self._weights.setdefault(number, []).append(norm)

    def repeat(self, number: int, other: Tensor, new: Tensor, old: Sequence[Tensor]) -> Tensor:
        """Take note of evaluation n when it is done again; return the sketch of w_(n-2).

        Args:
            number: n.
            other: the sketch of w_(n-1), F's input, as it was recovered.
            new: of w_n.
            old: the leaves of w_(n-2) that follow from them.
        """
        sketch = self.sketch(old)
        self._repeated[number] = (other, new, sketch)
        return sketch

    @torch.no_grad()
    def loss(self) -> Loss | None:
        """Return what was lost since this was last asked.

        None where cotangents are not finite, and on the meta device, which has no numbers.
        """
        if self._true[0].is_meta:
            return None
        numbers = sorted(self._repeated, reverse=True)
        other, new, old = (
            torch.stack(parts) for parts in zip(*map(self._repeated.get, numbers), strict=True)
        )
        true = torch.stack(self._true)
        at = torch.tensor(numbers, device=true.device)
        whole = _norm(true[at + 1]).maximum(_norm(true[at])).amax(1, keepdim=True)
        state = _relative(other - true[at], true[at], whole)
        image = _relative(
            self._image(new - true[at + 1], old - true[at - 1]),
            self._image(true[at + 1], true[at - 1]),
            whole,
        )
        off = torch.maximum(state, image)
        share = torch.maximum(off.sqrt(), off).cumsum(0)
        zero = share.new_zeros(())
        weights = self._weights_of(numbers, zero)
        error = (weights * share).sum() / weights.sum().clamp(min=torch.finfo(zero.dtype).tiny)
        repeated = (state == 0) & (_norm(new - true[at + 1]) == 0).all(1)
        changed = torch.where(repeated, image, zero).amax()
        # If all states are finite, an infinite cotangent came in. It passes, for GradScaler to see.
        finite, weighed = off.isfinite().all(), weights.isfinite().all()
        found = torch.stack([finite.to(zero), weighed.to(zero), error, changed]).tolist()
        self._repeated.clear()
        self._weights.clear()
        return Loss(found[2], found[3], bool(found[0])) if found[1] or not found[0] else None

    def _weights_of(self, numbers: Sequence[int], like: Tensor) -> Tensor:
        """Return the norms of the cotangents of evaluations, of all leaves together."""
        pairs = [
            (place, norm.to(like.device))
            for place, number in enumerate(numbers)
            for norm in self._weights.get(number, ())
        ]
        weights = like.new_zeros(len(numbers))
        if pairs:
            places, norms = zip(*pairs, strict=True)
            at = torch.tensor(places, device=like.device)
            weights.index_add_(0, at, torch.stack(norms).to(like.dtype))
        return weights

    def _image(self, new: Tensor, old: Tensor) -> Tensor:
        """Return the sketch of F(w_(n-1)), which is linear in those of w_n and w_(n-2)."""
        return (new - (1 - self._beta) * old) / self._beta


def _norm(sketch: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(sketch, dim=2)
    return norm


def _relative(error: Tensor, size: Tensor, whole: Tensor) -> Tensor:
    """Return the largest relative error of a leaf, shape (evaluations,); sketches are given."""
    floor = (_FLOOR * whole).clamp(min=torch.finfo(whole.dtype).tiny)
    relative: Tensor = _norm(error) / _norm(size).maximum(floor)
    return relative.amax(1)
