"""Finds out what gradients take for granted of F.

Samples are to be independent, or else the batch is solved as one system. F is to be the same map
each time. The state is to be an equilibrium of F. `settled` looks at all three before a strategy
acts, without a trace, and remembers the first two.
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ._plumbing.compilation import never_compiled
from ._plumbing.identity import identity, is_alive
from ._plumbing.lockstep import active, part
from ._plumbing.once import warn_once
from ._plumbing.random_state import forked_rng, is_same, random_state
from ._plumbing.transforms import in_torch_func
from ._plumbing.trial import Trial
from ._plumbing.watch import Watch
from .adjoint import Linearization, Packing, batch_size, mixes_samples
from .contract.errors import AssumptionWarning
from .contract.state import State, flatten
from .contract.strategy import Context

# Kernels on a GPU may add in another order each time. Where random state or a buffer changed, this
# rounding is measured by two evaluations with the same draws. The difference of such a pair varies,
# hence the factor. Where nothing changed, a difference may be the rounding of 16 bits inside F.
_ROUNDING, _ROUNDING_INSIDE = 8, 1e-3
_EARLY, _EVERY = (7, 17, 31), 61  # uses at which the question is asked again; see `is_due`
_MOST = 32  # the most maps of the same code and modules that are told apart by numbers and names
FAR = 0.1  # ||F(h) - h|| over their size above which a sample is no equilibrium; as in guard
_NEAR = 1e-3  # root mean square of F(h) - h that is near; TorchDEQ stops at a norm of 1e-3
_DRAWS = 16  # further evaluations of an F that draws numbers, and has returned the same so far

REMEDY = (
    "Draw masks once per solve: give the solve deq_phantom_plugin.draws.SameDraws(func), a new one "
    "in every forward pass. Or put the modules that draw or update in evaluation mode."
)


@dataclass(frozen=True, eq=False)
class Findings:
    """What was found out about F.

    Attributes:
        coupled: whether samples depend on one another; None where there was only one sample.
        difference: the relative difference ||F(h) - F(h)|| / ||F(h)|| of two evaluations at one
            state; zero where rounding explains it.
        reasons: the types of the modules in F that draw at random or update buffers, in words. It
            is empty where there is no difference.
        residual: ||F(h) - h|| / max(||F(h)||, ||h||) of the sample in which it is largest. Zero
            where F(h) - h is small in absolute terms, since h* may be 0. Infinite where F(h) is not
            finite.
        far: in how many samples the residual is above `FAR`.
        samples: the number of samples; 1 where they are coupled.
        modes: the modules that ran in F, and for each whether it was in training mode.
        uses: how often these findings were relied on. The list holds one number, which changes.
    """

    coupled: bool | None
    difference: float = 0.0
    reasons: tuple[str, ...] = ()
    residual: float = 0.0
    far: int = 0
    samples: int = 1
    modes: tuple[tuple[weakref.ref[nn.Module], bool], ...] = ()
    uses: list[int] = field(default_factory=lambda: [0])

    @property
    def are_current(self) -> bool:
        """Whether all modules that ran are still in the mode in which they ran."""
        for reference, training in self.modes:
            module = reference()
            if module is None or module.training is not training:
                return False
        return True

    @property
    def is_due(self) -> bool:
        """Count a use, and return whether it is time to ask again.

        The answer may change: weights that begin at zero couple nothing yet, and dropout may be
        warmed up. F is inspected again at the 7th use, the 17th and the 31st, and at every 61st.
        These are primes: where a training step has two solves, or eight, each has its turn.
        """
        if not self.are_current:
            return True
        self.uses[0] += 1
        return self.uses[0] in _EARLY or self.uses[0] % _EVERY == 0


def in_words(difference: float, reasons: Sequence[str]) -> str:
    """Return in words what `Findings` say about a map that is not the same each time."""
    known = "; ".join(reasons) or (
        "no module in F draws from PyTorch's generators or updates a buffer, so F draws from "
        "another generator, or keeps state elsewhere"
    )
    return f"two evaluations at one state differ by {difference:.1e} of their size ({known})"


def settled(
    context: Context,
    func: Callable[[State], State],
    equilibrium: State,
    cares: bool = True,
    judged: bool = False,
) -> Context:
    """Return a context whose `batch_dim` is a dimension or None, as strategies see it.

    The context's memory keeps what is found, for each mode of the modules that run in F and for
    each structure of the state. Sizes do not matter. Without a memory every call inspects F anew.
    That costs two evaluations of F and, for B samples, n vector-Jacobian products with n choose n/2
    at least B: 4 for 6 samples, 7 for 32, 10 for 252. Random state and buffers stay as they were.
    Inside a transform of `torch.func` F is not inspected, and the state is one system.

    Args:
        context: the context of the caller.
        func: F.
        equilibrium: h*, detached.
        cares: whether the gradient depends on `batch_dim`. If not, nothing is evaluated.
        judged: whether someone else looks at how near the state is to an equilibrium, or it need
            not be one.

    Warns:
        AssumptionWarning: once, if samples turn out to be coupled, F is not the same map each time,
            or the state is far from an equilibrium of F.

    Raises:
        ValueError: if `batch_dim` is a dimension that the state does not have.
    """
    leaves, structure = flatten(equilibrium)
    if context.batch_dim != "auto":
        _check_told(context.batch_dim, leaves)
        return context
    n_samples = batch_size(leaves, 0)
    dim = None if n_samples is None else 0  # the leaves may not agree on a number of samples
    if not cares or (dim is None and judged):  # then there is nothing to find out
        return replace(context, batch_dim=dim)
    is_empty = n_samples == 0 or all(leaf.numel() == 0 for leaf in leaves)
    if in_torch_func():  # values cannot be read there, and one system is right for any map
        return replace(context, batch_dim=dim if is_empty else None)
    with part():
        if is_empty:
            if (around := active()) is not None:  # other processes may have samples, and look
                around.look(func, equilibrium)
            return replace(context, batch_dim=dim)
        found = _found(context, func, equilibrium, f"{structure}", n_samples, judged)
    return replace(context, batch_dim=None if found.coupled else dim)


@never_compiled
def _found(
    context: Context,
    func: Callable[[State], State],
    equilibrium: State,
    structure: str,
    n_samples: int | None,
    judged: bool,
) -> Findings:
    """Return what the memory knows about F, or inspect F now and keep what is found."""
    memory = context.memory
    if memory is None:
        found = inspect_map(func, equilibrium, None if n_samples is None else 0)
        _say(found, judged)
        return found
    *same, constants = identity(func)
    same = [memory.training, structure, judged, *same]
    key = (*same, constants)
    if key not in memory.findings:
        # A number may count steps. Then each step has another map, but not one to ask about.
        others = [known for known in list(memory.findings) if list(known[:-1]) == same]
        key = (*same, ()) if len(others) >= _MOST else key
    known: Findings | None = memory.findings.get(key)
    if known and not known.is_due and (known.coupled is not None or (n_samples or 0) <= 1):
        return known
    found = inspect_map(func, equilibrium, None if n_samples is None else 0)
    _say(found, judged)
    if known is not None and known.are_current:
        found = replace(found, uses=known.uses)
    for old in list(memory.findings):  # other threads may share the memory
        if not is_alive(old):
            memory.findings.pop(old, None)
    memory.findings[key] = found
    return found


def _check_told(batch_dim: int | None, leaves: Sequence[Tensor]) -> None:
    """Refuse a dimension that no leaf has. 0 is accepted for leaves without dimensions too."""
    most = max(leaf.dim() for leaf in leaves)
    if batch_dim and batch_dim not in range(-most, most):
        raise ValueError(
            f"batch_dim={batch_dim} of a state with at most {most} dimensions; expected one of "
            "these, None where samples depend on one another, or 'auto' to find that out"
        )


def say_coupled() -> None:
    """Warn once that the batch is treated as one system."""
    warn_once(
        "coupled samples",
        "the samples of the batch depend on one another (batch normalisation in training, "
        "attention over the batch, nodes of a graph), so the batch is treated as one system. Pass "
        "batch_dim=None in the context or to dpp.Equilibrium (with TorchDEQ: deq.grad_batch_dim = "
        "None) to say so; then nothing has to be found out. This is said once per run.",
        AssumptionWarning,
    )


def _say(found: Findings, judged: bool) -> None:
    if found.coupled:
        say_coupled()
    if found.difference:  # then a residual is that of two draws, and says nothing
        warn_once(
            "another map each time",
            f"F is not the same map each time: {in_words(found.difference, found.reasons)}. So it "
            "has no equilibrium that a solve could find, and a gradient that evaluates F again is "
            f"that of another map. {REMEDY} This is said once per run.",
            AssumptionWarning,
        )
    elif found.far and not judged:
        where = f" in {found.far} of {found.samples} samples" if found.samples > 1 else ""
        at_most = "up to " if found.far > 1 else ""
        apart = f"differs from h by {at_most}{found.residual:.0%} of its size"
        warn_once(
            "far from an equilibrium",
            f"h is no equilibrium of F{where}: F(h) "
            f"{apart if math.isfinite(found.residual) else 'is not finite'}. "
            "The gradient takes h = F(h) for granted, so it may be wrong. Either the forward solve "
            "stopped short: give it more iterations or a smaller tol. Or F is not the map that was "
            'solved, but has another input, mask or mode. "guard(...)" around the strategy acts '
            "on each such sample. This is said once per run.",
            AssumptionWarning,
        )


def inspect_map(
    func: Callable[[State], State], equilibrium: State, batch_dim: int | None = 0
) -> Findings:
    """Find out whether F mixes samples, and whether it is the same map each time.

    Args:
        func: F.
        equilibrium: a state to evaluate it at, detached.
        batch_dim: the dimension along which samples lie; None skips the question of samples.
    """
    with Trial(equilibrium) as trial:
        # Random state goes on inside a trial, so an F that draws gets new numbers in a second run.
        states = [random_state(flatten(equilibrium)[0])]
        graph = Linearization(func, equilibrium)
        states.append(random_state(graph.inputs))
        packing = Packing(graph.inputs, batch_dim)
        coupled: bool | None = None
        if packing.rows > 1:
            coupled = not _shards(trial.modules) and mixes_samples(graph, packing)
        dim = None if coupled else batch_dim
        residual, far, samples = _residual(graph.outputs, flatten(equilibrium)[0], dim)
        difference = _second_look(func, equilibrium, graph.outputs)
        states.append(random_state(graph.inputs))
        signs = trial.has_changed_buffers or not is_same(*states[:2])
        draws = not is_same(*states[1:])  # a second time: masks of a whole solve are kept
        known = not signs or not (difference or draws)
        limit = _ROUNDING_INSIDE if known else _rounding(func, equilibrium)
        for _ in range(_DRAWS if draws else 0):  # a layer that is seldom skipped, say
            if difference > limit:
                break
            difference = _second_look(func, equilibrium, graph.outputs)
        if difference <= limit:
            difference = 0.0
        reasons = _reasons(func, equilibrium, limit) if difference else ()
        modes = tuple((weakref.ref(module), module.training) for module in trial.modules)
    return Findings(coupled, difference, reasons, residual, far, samples, modes)


def _residual(
    image: Sequence[Tensor], state: Sequence[Tensor], batch_dim: int | None
) -> tuple[float, int, int]:
    """Return the largest residual of a sample, how many are far, and how many there are."""
    packing = Packing(image, batch_dim)
    images = packing.pack([leaf.detach() for leaf in image])
    states = packing.pack([h.to(x.dtype) for h, x in zip(state, image, strict=True)])
    norm = functools.partial(torch.linalg.vector_norm, dim=1)
    change, size = norm(images - states), torch.maximum(norm(images), norm(states))
    is_near = change <= _NEAR * math.sqrt(packing.columns)
    residual = torch.where(is_near, 0.0, change / size).nan_to_num(math.inf, math.inf)
    largest, far = torch.stack([residual.max(), (residual > FAR).sum()]).tolist()
    return largest, int(far), packing.rows


def _shards(modules: Sequence[nn.Module]) -> bool:
    """Whether F holds modules that are sharded by themselves. Warns once if it does.

    FSDP takes a backward pass through such a module for that of the whole model, and frees weights
    that the forward pass still needs. So no product may be taken. Lockstep keeps FSDP2 from that.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    names = ["FullyShardedDataParallel"] if active() else ["FSDPModule", "FullyShardedDataParallel"]
    kinds = tuple(getattr(fsdp, name, ()) for name in names)
    if not any(isinstance(module, kind) for module in modules for kind in kinds):
        return False
    warn_once(
        "sharded by itself",
        "F holds modules that are sharded by themselves (FSDP), so it cannot be found out whether "
        "samples depend on one another. They are taken to be independent. Pass batch_dim=0 in the "
        "context if they are, or batch_dim=None if they are not. This is said once per run.",
        AssumptionWarning,
    )
    return True


@torch.no_grad()
def _second_look(
    func: Callable[[State], State], equilibrium: State, first: Sequence[Tensor]
) -> float:
    """Evaluate F again, and return the relative difference to the first time."""
    return _difference(first, flatten(func(equilibrium))[0])


def _rounding(func: Callable[[State], State], equilibrium: State) -> float:
    """Return the relative difference of two evaluations with the same draws and buffers."""
    images = []
    for _ in range(2):
        with Trial(equilibrium), torch.no_grad():
            images.append(flatten(func(equilibrium))[0])
    finest = min(torch.finfo(leaf.dtype).eps for leaf in [*images[0], torch.empty(0)])
    return _ROUNDING * max(_difference(*images), finest)


def _difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return ||a - b|| / max(||a||, ||b||), all leaves together; zero where it is not finite."""

    def norm(leaves: Sequence[Tensor]) -> float:
        return math.hypot(*(float(torch.linalg.vector_norm(leaf)) for leaf in leaves))

    # In 16 bits a norm overflows at 65504.
    wide = [torch.promote_types(leaf.dtype, torch.float32) for leaf in first]
    first = [leaf.detach().to(dtype) for leaf, dtype in zip(first, wide, strict=True)]
    second = [leaf.detach().to(dtype) for leaf, dtype in zip(second, wide, strict=True)]
    change = norm([a - b for a, b in zip(first, second, strict=True)])
    size = max(norm(first), norm(second))
    return change / size if size > 0 and math.isfinite(change / size) else 0.0


# --- who draws ---------------------------------------------------------------------------------


def _reasons(func: Callable[[State], State], equilibrium: State, limit: float) -> tuple[str, ...]:
    """Evaluate F twice more, and return what in it draws or updates, in words.

    Args:
        func: F.
        equilibrium: where to evaluate it.
        limit: the relative difference that rounding can make.
    """
    leaves = flatten(equilibrium)[0]
    images = []
    for _ in range(2):
        with forked_rng(leaves), Watch(leaves) as watch, torch.no_grad():
            images.append(flatten(func(equilibrium))[0])
            watch.look()  # at what came after the last module
    # Same draws, same value: then updates do not matter, as those of batch normalisation.
    same = _difference(*images) <= limit
    updated = set() if same else watch.updated - watch.drew
    return (
        *(f"{name} draws at random" for name in sorted(watch.drew)),
        *(f"{name} updates its buffers" for name in sorted(updated)),
    )
