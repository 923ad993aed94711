"""Transformers' hierarchical recurrent language models (`hrm_text`): `config.grad = "npg"`.

`HrmTextModel` runs `L_cycles` evaluations of its low-level module in each of `H_cycles` high-level
cycles, and cuts the gradient by hand: of those evaluations the last `L_bp_cycles` carry it. While
this host is enabled, a model with a `grad` gives each such recurrence to a strategy, as the
equilibrium z = F(z) = L_module(z + z_H) that its last iterate is taken for:

- Outside training, and without a `grad`, Transformers' own code runs.
- It is a `dpp.loop` of `L_cycles` evaluations: `tbptt(k)` is what `L_bp_cycles=[k]` does, bit for
  bit, and the value is that of evaluation wherever that page says so.
- A list has one spec for each high-level cycle. The default, `L_bp_cycles=[2]` with two of them, is
  `["tbptt(k=1)", "tbptt(k=2)"]`.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._plumbing.compilation import never_compiled
from .._plumbing.extras import is_there, why_not
from .._plumbing.trial import Trial
from ..contract.errors import AssumptionWarning
from ..contract.strategy import Context, GradStrategy
from ..strategies import TBPTT
from ..strategies.registry import FunctionStrategy, get_strategy
from .evaluation import attaches
from .host import PatchingHost
from .patches import Patches
from .settings import remember_each
from .solve import loop_observed

_MODULE = "transformers.models.hrm_text.modeling_hrm_text"


class HrmText(PatchingHost):
    """The hook into `HrmTextModel` of Transformers 5."""

    name = "hrm_text"
    package = "transformers"
    known_versions = ("5",)
    pip = '"deq-phantom-plugin[text]"'
    in_eval = "told"  # otherwise evaluation has the model's own gradient

    def installed(self) -> bool:
        """Whether there is a Transformers that has the model; does not import it."""
        spec = find_spec(self.package) if is_there(self.package) else None
        folders = spec.submodule_search_locations if spec is not None else None
        return any((Path(folder) / "models" / "hrm_text").is_dir() for folder in folders or ())

    def why_broken(self) -> str:
        """See `Host.why_broken`; Transformers imports its models when they are asked for."""
        return why_not(_MODULE)

    def patch(self, patches: Patches) -> None:
        """Hook the model and the modules of its recurrence, when Transformers loads them."""

        def apply(module: Any) -> None:
            patches.replace(module.HrmTextModel, "__init__", _hook_init(self))
            patches.replace(module.HrmTextModel, "forward", _hook_forward(self))
            patches.replace(module.HrmTextStack, "forward", _hook_part)
            patches.replace(module.HrmTextRotaryEmbedding, "forward", _hook_part)
            patches.add(module.HrmTextPreTrainedModel, "set_grad", _set_grad)
            # A saved training step is no weight that a loader has to place.
            for ignored in ("unexpected", "missing"):
                name = f"_keys_to_ignore_on_load_{ignored}"
                patches.add(module.HrmTextPreTrainedModel, name, ["grad_memory"])

        patches.when_imported(_MODULE, apply)

    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module is an `HrmTextModel`."""
        loaded = sys.modules.get(_MODULE)
        return loaded is not None and isinstance(module, loaded.HrmTextModel)

    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """See `Host.prepare_grad`; a list has one spec a high-level cycle, None ends it."""
        strategies = _strategies(module, spec)
        as_text = [repr(s) for s in strategies] if strategies else None
        saved = as_text[0] if as_text and len(set(as_text)) == 1 else as_text
        if any(isinstance(s, FunctionStrategy) for s in strategies):
            saved = getattr(module.config, "grad", None)  # a function has no name to be saved

        def switch() -> None:
            _install(module, strategies, saved)
            module.config.grad = saved  # type: ignore[union-attr, assignment]

        return switch


def _set_grad(self: nn.Module, spec: Any) -> None:
    """Switch the gradient of the low-level recurrence, now and in the config.

    Args:
        self: a model of the `hrm_text` family.
        spec: a spec of `dpp.get_strategy`, or a list of them, one a high-level cycle; None for the
            model's own `L_bp_cycles`.

    Raises:
        ValueError: on an invalid spec or a list of another length; then nothing is switched.
    """
    host = HrmText()
    switches = [host.prepare_grad(m, spec) for m in self.modules() if host.is_equilibrium(m)]
    for switch in switches:
        switch()


def _strategies(model: Any, spec: Any) -> tuple[GradStrategy, ...]:
    """Return a strategy for each high-level cycle, or none for a spec of None."""
    if spec is None:
        return ()
    cycles = model.config.H_cycles
    specs = list(spec) if isinstance(spec, list | tuple) else [spec] * cycles
    if len(specs) != cycles:
        raise ValueError(
            f"grad={spec!r} has {len(specs)} entries; expected one, or H_cycles={cycles}"
        )
    return tuple(get_strategy(each, {"steps": model.config.L_cycles}) for each in specs)


def _install(model: Any, strategies: tuple[GradStrategy, ...], of: Any) -> None:
    """Give a model its strategies, those of the `grad` in its config."""
    model.__dict__["_deq_phantom_grad"] = (of, strategies)
    if strategies:
        remember_each(model, len(strategies))


def _current(model: Any) -> tuple[GradStrategy, ...]:
    """Return a model's strategies: those of its config, whenever that was written."""
    grad = getattr(model.config, "grad", None)
    strategies: tuple[GradStrategy, ...]
    of, strategies = model.__dict__.get("_deq_phantom_grad", (None, ()))
    if grad != of:
        strategies = _strategies(model, grad)
        _install(model, strategies, grad)
    return strategies


def _own(model: Any) -> tuple[GradStrategy, ...]:
    """Return what the model's `L_bp_cycles` do, as strategies."""
    config, padded = model.config, model.L_bp_cycles_padded
    counts = [padded[i] if i < len(padded) else 1 for i in range(config.H_cycles)]
    return tuple(TBPTT(k=min(k, config.L_cycles)) for k in counts)


# --- hooks ------------------------------------------------------------------------------------


def _hook_init(host: HrmText) -> Callable[[Any], Any]:
    def hook(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, config, *args, **kwargs)
            if host.is_enabled:
                _current(self)
                remember_each(self, self.config.H_cycles)  # before anybody tells the step

        return __init__

    return hook


def _hook_forward(host: HrmText) -> Callable[[Any], Any]:
    def hook(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not attaches(self):
                output = original(self, *args, **kwargs)
                if host.is_enabled and torch.is_grad_enabled() and output[0].requires_grad:
                    _say_own(self)
                return output
            strategies: tuple[GradStrategy, ...] = ()
            if host.is_enabled:
                strategies = _current(self)
            observers = host.observers(self) if self.training else []
            if not strategies and not observers:
                return original(self, *args, **kwargs)
            caches = [args[3] if len(args) > 3 else None, kwargs.get("cache")]
            if any(cache is not None for cache in [*caches, kwargs.get("past_key_values")]):
                raise ValueError(
                    "a cache in training: a strategy evaluates the low-level module again and "
                    "would fill the cache twice; pass no cache (use_cache=False), or call "
                    "model.set_grad(None)"
                )
            kwargs["use_cache"] = False
            with _Recurrence(self, strategies or _own(self), observers).active():
                return original(self, *args, **kwargs)

        return forward

    return hook


class _Parts(threading.local):
    """What this thread's forward passes do in place of the forwards of their modules."""

    def __init__(self) -> None:
        self.by_module: dict[int, Callable[..., Any]] = {}


_parts = _Parts()


@never_compiled
def _say_own(model: Any) -> None:
    """Say once that the gradient in evaluation mode is not the one that was named."""
    if Trial.depth() or model.__dict__.get("_said_of_eval") or not _current(model):
        return
    model.__dict__["_said_of_eval"] = True
    warnings.warn(
        f"{type(model).__name__} in evaluation mode has its own gradient, that of L_bp_cycles, and "
        f"not grad={model.config.grad!r}. Call model.train() to train; for the named gradient in "
        "evaluation mode dpp.set_grad(model, spec, in_eval=True). Where none is wanted, evaluate "
        "under torch.no_grad(). This is said once per model.",
        AssumptionWarning,
        stacklevel=3,
    )


def _hook_part(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        part = _parts.by_module.get(id(self))
        if part is None:
            return original(self, *args, **kwargs)
        return part(functools.partial(original, self), *args, **kwargs)

    return forward


class _Recurrence:
    """One forward pass of a model, whose low-level recurrences are loops of strategies.

    The model's own loop goes on around it: what the low-level module is called with is the sum of
    both states, and what it returns before the last call is not looked at.
    """

    def __init__(
        self, model: Any, strategies: tuple[GradStrategy, ...], observers: list[Any]
    ) -> None:
        self.model, self.strategies, self.observers = model, strategies, observers
        self.cycle = self.calls = 0
        self.high: Tensor | None = None
        self.low: Any = None

    @contextmanager
    def active(self) -> Iterator[None]:
        model, parts = self.model, _parts.by_module
        mine = {
            id(model.rotary_emb): self.embed,
            id(model.L_module): self.low_level,
            id(model.H_module): self.high_level,
        }
        before = {key: parts[key] for key in mine if key in parts}
        parts.update(mine)
        try:
            yield
        finally:
            for key in mine:
                del parts[key]
            parts.update(before)

    def embed(self, original: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take note of the embeddings, with which the high-level state begins."""
        self.high = x
        return original(x, *args, **kwargs)

    def high_level(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Take note of the high-level state."""
        self.high = original(*args, **kwargs)
        self.cycle, self.calls = self.cycle + 1, 0
        return self.high

    def low_level(self, original: Callable[..., Any], _: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Do nothing until the last call of a cycle, which has a graph; there do the whole loop."""
        model, high = self.model, self.high
        assert high is not None
        if self.low is None:  # where the model begins
            first = model.z_L_init.to(dtype=high.dtype, device=high.device)
            self.low = first.expand_as(high).contiguous()
        self.calls += 1
        cycles = model.config.L_cycles
        if self.calls < cycles:
            return self.low

        def func(z: Tensor) -> Tensor:
            return original(z.to(high.device) + high, *args, **kwargs)  # type: ignore[no-any-return]

        memories = getattr(model, "grad_memory", None)
        memory = None if memories is None else memories[self.cycle]
        context = Context(initial_state=self.low, memory=memory)
        strategy = self.strategies[self.cycle].resolve(context)
        self.low = loop_observed(
            self.observers, func, self.low, cycles, strategy, context, self.cycle
        )
        return self.low
