"""When an evaluation of F is done again, it finds the buffers of the first time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .._plumbing.buffers import Buffers, Seen, held, version
from .._plumbing.compilation import eager


class Replay:
    """Keeps the buffers that evaluations of F update, as each evaluation found them.

    The value of F may depend on such buffers, as with spectral norm in training mode. After the
    backward pass they hold again what the forward pass left in them. The modules that run are
    found in the first evaluation, and F must run the same ones each time. F runs as it was
    written, since modules inside compiled code are not seen.

    Running statistics of BatchNorm change in ways that PyTorch does not count, so that they are not
    kept. They are not needed either: training mode does not read them.
    """

    def __init__(self) -> None:
        self._ran: list[nn.Module] = []
        self._now: dict[tuple[nn.Module, str], Seen] = {}
        self._found: list[dict[tuple[nn.Module, str], Seen]] = []  # in each evaluation

    @contextmanager
    def next(self) -> Iterator[None]:
        """Evaluate F for the next time inside a `with` block."""
        with eager():
            if self._found:
                yield
            else:
                buffers = Buffers()
                with buffers.noting():
                    yield
                self._ran, self._now = list(buffers.modules), buffers.seen
        self._found.append(self._changes())

    @contextmanager
    def again(self, number: int) -> Iterator[None]:
        """Evaluate F inside a `with` block with the buffers of evaluation `number`, from 1."""
        buffers = Buffers()
        for module, _ in self._now:
            buffers.note(module)
        # Among these may be buffers that F lends to a module, which the module does not hold now.
        present = [Seen.now(seen.buffer) for seen in self._found[number - 1].values()]
        try:
            for (module, name), seen in self._found[number - 1].items():
                seen.put_back(module, name)
            with eager(), buffers.noting():
                yield
        finally:
            buffers.put_back()
            for seen in present:
                seen.restore()

    def suspects(self) -> list[str]:
        """Return the types of the modules that ran, and that draw at random or update buffers."""
        updated = {module for found in self._found for module, _ in found}
        return sorted({type(m).__name__ for m in self._ran if m in updated or _draws(m)})

    def _changes(self) -> dict[tuple[nn.Module, str], Seen]:
        """Return the old values of the buffers that have changed since the last look."""
        changed = {}
        for (module, name), seen in self._now.items():
            buffer = held(module, name)
            if buffer is not seen.buffer or version(buffer) != seen.version:
                if seen.buffer is None or seen.value is not None:
                    changed[module, name] = seen
                self._now[module, name] = Seen.now(buffer)
            elif not self._found:  # a constant is not kept twice
                self._now[module, name] = seen._replace(value=None)
        return changed


def _draws(module: nn.Module) -> bool:
    rates = (getattr(module, name, 0) for name in ("p", "dropout"))
    return module.training and any(isinstance(rate, float) and rate > 0 for rate in rates)
