"""Times a whole training step: solve, attach, backward pass, optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map

import deq_phantom_plugin as dpp

from .. import work
from ..accounting import Counted
from ..contest import Contender, Contest, Ratio, Settings, available
from ..peers import PhantomGrad, Silva, evaluations, torchdeq
from ..timing import Run
from ..work import Training, residuals

FORWARD, BACKWARD = 22, 24  # evaluations of f in the solve, and products in the adjoint solve
PG, IFT = "broyden + phantom gradient (5, 0.5)", "broyden + ift (broyden, 24)"
LAYER = "phantom_grad: its layer (Broyden, pg_steps=5, tau=0.5)"
AS_IN_ZOO = ", f as in the deq-zoo"
OURS = {
    "broyden_fast + upg": "upg(k=5, lam=0.5)",
    "broyden_fast + npg": "npg(k=5, lam=0.5)",
    "broyden_fast + ift, 24 VJPs": f"ift(tol=1e-12, max_iter={BACKWARD})",
    "broyden_fast + ift, as it comes": "ift",
    "broyden_fast + shine": "shine",
    "broyden_fast + jfb": "jfb",
}
SILVA: dict[str, dict[str, Any]] = {
    "broyden + phantom": {"backward_mode": "phantom", "phantom_steps": 5, "phantom_tau": 0.5},
    "broyden + neumann": {"backward_mode": "neumann", "neumann_terms": 5},
    "broyden + implicit (gmres, 24)": {"backward_mode": "implicit", "backward_max_iter": BACKWARD},
    "broyden + shine": {"backward_mode": "shine"},
}


def contests(settings: Settings) -> Iterator[Contest]:
    """Yield one contest per model; the learning rate is zero, so the weights stay the same."""
    for training in trainings(settings):
        contenders = list(_contenders(training, settings))
        upg = "broyden_fast + upg"
        ratios = [Ratio(upg, f"torchdeq: {PG}", 0.68), Ratio(upg, f"torchdeq: {IFT}", 0.36)]
        if any(c.method.endswith(AS_IN_ZOO) for c in contenders):
            ratios.insert(1, Ratio(upg, f"torchdeq: {PG}{AS_IN_ZOO}", 0.68))
            ratios.append(Ratio(upg, f"torchdeq: {IFT}{AS_IN_ZOO}", 0.36))
        if any(c.method == LAYER for c in contenders):
            ratios.append(Ratio(upg, LAYER))
        ratios += [Ratio(name, f"torchdeq: {IFT}") for name in OURS if name != upg]
        ratios += [
            Ratio("broyden_fast + upg", "silva: broyden + phantom", 0.95),
            Ratio("broyden_fast + npg", "silva: broyden + neumann", 0.95),
            Ratio("broyden_fast + ift, 24 VJPs", "silva: broyden + implicit (gmres, 24)", 0.95),
            Ratio("broyden_fast + shine", "silva: broyden + shine", 0.95),
        ]
        yield Contest(
            "step", training.name, contenders, ratios, known=training.parameters, repeats=7
        )


def trainings(settings: Settings) -> Iterator[Training]:
    """Yield the models that can be built on this machine."""
    builders: list[Callable[[], Training]] = [
        lambda: work.synthetic_training(*(16, 4) if settings.quick else (512, 64), settings)
    ]
    for layout in work.FORMATS:
        builders.append(lambda layout=layout: work.mdeq_training("tiny", settings, layout))
    if not settings.quick:
        builders.append(lambda: work.mdeq_training("small", settings, "channels_last"))
        builders.append(lambda: work.transformer_training(512, 4, 64, settings))
    builders.append(lambda: work.transformer_training(128, 16, 64, settings))
    yield from available(builders)


def _contenders(training: Training, settings: Settings) -> Iterator[Contender]:
    solve: dict[str, Any] = {"f_tol": 0.0, "f_stop_mode": "rel"}

    def peer(solver: str, **more: Any) -> Any:
        return lambda: torchdeq(
            f_solver=solver, f_max_iter=evaluations(solver, FORWARD), **solve, **more
        )

    phantom = peer("broyden", grad=5, tau=0.5)
    implicit = peer("broyden", ift=True, b_solver="broyden", b_max_iter=BACKWARD - 1, b_tol=0.0)
    yield _contender(f"torchdeq: {PG}", "torchdeq", phantom, training)
    yield _contender(f"torchdeq: {IFT}", "torchdeq", implicit, training)
    # It matters only for an MDEQ in channels_last whether f restores the memory format.
    if "channels_last" in training.name:
        for name, make in ((PG, phantom), (IFT, implicit)):
            yield _contender(f"torchdeq: {name}{AS_IN_ZOO}", "torchdeq", make, training, False)
    if "MDEQ" in training.name:
        # Its solver counts Broyden updates, of which there is one less than evaluations.
        layer = lambda: PhantomGrad(5, 0.5, updates=FORWARD - 1)  # noqa: E731
        yield _contender(LAYER, "Gsunshine/phantom_grad", layer, training)
    for name, spec in OURS.items():
        yield _contender(name, "ours", peer("broyden_fast", grad=spec), training)
    for name, options in SILVA.items():
        # Its `max_iter` counts Broyden updates, of which there is one less than evaluations.
        yield _contender(
            f"silva: {name}",
            "silva",
            lambda options=options: Silva(
                training.parameters,
                solver="broyden",
                max_iter=FORWARD - 1,
                history=FORWARD,
                **options,
            ),
            training,
        )


def _contender(
    method: str,
    peer: str,
    make_deq: Callable[[], Any],
    training: Training,
    restores_format: bool = True,
) -> Contender:
    made: list[Run] = []

    def make() -> Run:
        made.append(step(training, make_deq(), restores_format))
        return made[0]

    return Contender(method, peer, make, measure=lambda: counts(training, made[0]) if made else {})


def step(training: Training, deq: Any, restores_format: bool = True) -> Run:
    """Return a training step in which a module solves and attaches."""
    optimizer = torch.optim.Adam(training.parameters, lr=0.0)
    if not any(isinstance(module, dpp.Memory) for module in deq.modules()):
        deq.memory = dpp.Memory()  # the transformer adapter reads the training step from it

    def run() -> None:
        training.holder.deq = deq
        training.holder.restores_format = restores_format
        optimizer.zero_grad()
        training.loss().backward()
        optimizer.step()

    return run


def counts(training: Training, run: Run) -> dict[str, float]:
    """Return the evaluations of f and the backward passes in a step, and its largest residual."""
    counted: list[Counted] = []
    found: dict[str, float] = {}

    def before(module: Any, args: Any) -> Any:
        counted.append(Counted(args[0]))
        counted[0].counting = True
        return (counted[0], *args[1:])

    def after(module: Any, args: Any, output: Any) -> None:
        func, state = counted[0].func, tree_map(torch.Tensor.detach, output[0][-1])
        # This is the returned state. Phantom gradients have taken their damped steps from the state
        # of the solve.
        single = isinstance(state, torch.Tensor)
        residual = residuals(func if single else lambda leaves: list(func(*leaves)), state)
        found["residual, worst"] = float(residual.max())

    run()  # sets the contender's module as `deq`
    deq = training.holder.deq
    handles = [deq.register_forward_pre_hook(before), deq.register_forward_hook(after)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {"f": counted[0].evaluations, "VJPs": counted[0].backwards, **found}
