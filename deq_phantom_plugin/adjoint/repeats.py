"""Whether F, evaluated again in backward, returns what it did in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._plumbing.once import warn_once
from .._plumbing.sketch import Sketch
from ..contract.errors import AssumptionWarning

_TOLERANCE = 1e-2  # a relative difference above it is no rounding


class Repeats:
    """Compares evaluations that are done again with the first ones, and warns once if they differ.

    It keeps sketches of the states, not the states. It reads the device once per backward pass:
    when evaluation 0 is done again, which backward does last.

    Args:
        user: what evaluates F, such as a strategy. The warning names it.
    """

    def __init__(self, user: object) -> None:
        self._user = user
        self._sketch: Sketch | None = None
        self._first: dict[int, Tensor] = {}
        self._differences: list[Tensor] = []

    @torch.no_grad()
    def see(self, number: int, leaves: Sequence[Tensor]) -> None:
        """Take note of what evaluation `number` returned; compare, if it is not the first time.

        Args:
            number: the evaluation, from 0.
            leaves: the leaves of the state that it returned.
        """
        if torch.compiler.is_compiling() or leaves[0].is_meta:
            return
        # Projections are sums, which would overflow in 16 bits.
        leaves = [leaf.to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves]
        # A NaN in one sample must not hide what the others are.
        leaves = [torch.where(leaf.isfinite(), leaf, 0) for leaf in leaves]
        if self._sketch is None:
            self._sketch = Sketch(leaves)
        now = self._sketch(leaves)
        before = self._first.setdefault(number, now)
        if before is now:
            return
        # Relative to the whole state: a leaf that is all rounding may differ by its own size.
        size = torch.linalg.vector_norm(before).clamp(min=torch.finfo(now.dtype).tiny)
        self._differences.append(torch.linalg.vector_norm(now - before) / size)
        if number == 0:
            worst = float(torch.stack(self._differences).amax())
            self._differences.clear()
            if worst > _TOLERANCE:
                self._say(worst)

    def _say(self, difference: float) -> None:
        warn_once(
            "repeats",
            f"{self._user!r}: F was evaluated again in backward at the same state, and returned "
            f"something else than in the forward pass (by {difference:.1e} of its norm), so the "
            "gradient is wrong. A variable that F reads may have been given another value since, "
            "as in x = deq(lambda h: f(h, x), h0), or F may draw at random or update its buffers. "
            "Give the variable another name, or take a strategy that does not evaluate again: upg, "
            "npg, ift. This warning is given once.",
            AssumptionWarning,
        )
