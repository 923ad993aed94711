"""Measures training steps for an accelerator: kernel launches, synchronisations, bf16 and compile.

The group runs on any machine. Without a GPU, it counts operators, and numbers that the host reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config

from .. import work
from ..accounting import profiled
from ..contest import Contender, Contest, Ratio, Settings, Unavailable, available
from ..peers import evaluations, torchdeq
from ..timing import Run
from ..work import Training
from .step import FORWARD, OURS, step

MODES = ("eager", "bf16 autocast", "torch.compile")


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield one contest per model and mode; they have some of the contenders of group `step`."""
    trainings: list[Callable[[], Training]] = [
        lambda: work.synthetic_training(*(16, 4) if settings.quick else (2048, 64), settings),
        lambda: work.mdeq_training("tiny", settings, "channels_last"),
        lambda: work.transformer_training(512, 4, 64, settings),
    ]
    modes = MODES[:2] if settings.quick else MODES
    for training in available(trainings[:1] if settings.quick else trainings):
        for mode in modes:
            yield _contest(training, mode, settings)


def _contest(training: Training, mode: str, settings: Settings) -> Contest:
    solvers = ("broyden", "broyden_fast")
    specs = {"torchdeq: broyden + phantom gradient (5, 0.5)": ("broyden", 5)}
    chosen = ("broyden_fast + upg", "broyden_fast + npg", "broyden_fast + ift, 24 VJPs")
    specs |= {name: ("broyden_fast", OURS[name]) for name in chosen}
    contenders = []
    for name, (solver, grad) in specs.items():
        run: list[Run] = []

        def make(solver: str = solver, grad: Any = grad, run: list[Run] = run) -> Run:
            deq = torchdeq(
                f_solver=solver,
                f_max_iter=evaluations(solver, FORWARD),
                f_tol=0.0,
                f_stop_mode="rel",
                grad=grad,
                **({"tau": 0.5} if isinstance(grad, int) else {}),
            )
            run.append(_in_mode(training, deq, mode, settings))
            return run[0]

        contenders.append(
            Contender(
                name,
                "ours" if solver == solvers[1] else "torchdeq",
                make,
                measure=lambda run=run: profiled(run[0], settings.device) if run else {},
            )
        )
    peer = "torchdeq: broyden + phantom gradient (5, 0.5)"
    ratios = [Ratio(name, peer) for name in chosen]
    title = f"{training.name}, whole step, {mode}"
    return Contest("device", title, contenders, ratios, repeats=5)


def _in_mode(training: Training, deq: Any, mode: str, settings: Settings) -> Run:
    plain = step(training, deq)
    if mode == "bf16 autocast":

        def run() -> None:
            with torch.autocast(settings.device.type, torch.bfloat16):
                plain()

        return run
    if mode == "torch.compile":
        return _compiled(training, plain)
    return plain


def _compiled(training: Training, plain: Run) -> Run:
    """Return a step in which a part of f is compiled: an MDEQ's layer, a transformer's block."""
    holder = training.holder
    name = next((n for n in ("layer", "block", "activation") if hasattr(holder, n)), None)
    if name is None:
        raise Unavailable("nothing to compile")
    eager = getattr(holder, name)
    if isinstance(eager, torch.nn.Module):
        # This is what `eager.compile()` does, but only during our steps, since other contenders use
        # the same module.
        owner, attribute, value = eager, "_compiled_call_impl", torch.compile(eager._call_impl)
    else:
        owner, attribute, value = holder, name, torch.compile(eager)

    @contextlib.contextmanager
    def swapped() -> Iterator[None]:
        before = getattr(owner, attribute)
        setattr(owner, attribute, value)
        try:
            yield
        finally:
            setattr(owner, attribute, before)

    def run() -> None:
        # Contenders share compiled code. By default, the code that is compiled for the first one
        # donates its buffers, and then works for only one backward pass.
        with torch._functorch.config.patch(donated_buffer=False), swapped():
            plain()

    return run
