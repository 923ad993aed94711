"""The host of Transformers' hierarchical recurrent models (`hrm_text`): `config.grad = "npg"`.

`HrmTextModel` runs `H_cycles` high-level cycles. In each it evaluates its low-level module
`L_cycles` times, and only the last `L_bp_cycles` of these evaluations carry the gradient. If this
host is enabled and the model has a `grad`, a strategy gets each such recurrence. Its last iterate
is taken for the equilibrium of z = F(z) = L_module(z + z_H), with the high-level state z_H.

- Without a `grad`, and in evaluation mode without `grad_in_eval`, Transformers' own code runs.
- The recurrence is a `dpp.loop` of `L_cycles` evaluations. `tbptt(k)` is the same as
  `L_bp_cycles=[k]`, to the bit. `dpp.loop` says which strategies keep the value of the loop.
- A list has one spec for each high-level cycle. The default, `L_bp_cycles=[2]` with two of them, is
  `["tbptt(k=1)", "tbptt(k=2)"]`.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._plumbing.compilation import never_compiled
from .._plumbing.extras import is_there, why_not
from .._plumbing.once import warn
from .._plumbing.trial import Trial
from ..contract.errors import AssumptionWarning
from ..contract.strategy import Context, GradStrategy
from ..strategies import TBPTT
from ..strategies.registry import get_strategy
from .collected import OfLoop
from .evaluation import attaches
from .host import PatchingHost
from .patches import Patches
from .settings import fitting, remember_each, say_misspelt
from .solve import loop_observed
from .written import say_unwritten, written

_MODULE = "transformers.models.hrm_text.modeling_hrm_text"


class HrmText(PatchingHost):
    """The hook into `HrmTextModel` of Transformers 5."""

    name = "hrm_text"
    package = "transformers"
    known_versions = ("5",)
    pip = '"deq-phantom-plugin[text]"'
    in_eval = "told"  # if not told, evaluation mode has the model's own gradient

    def installed(self) -> bool:
        """Whether a Transformers is installed that has the model; nothing is imported."""
        spec = find_spec(self.package) if is_there(self.package) else None
        folders = spec.submodule_search_locations if spec is not None else None
        return any((Path(folder) / "models" / "hrm_text").is_dir() for folder in folders or ())

    def why_broken(self) -> str:
        """See `Host.why_broken`. The model's own module is imported: Transformers loads it late."""
        return why_not(_MODULE)

    def patch(self, patches: Patches) -> None:
        """Hook the model and the modules of its recurrence, when Transformers loads them."""

        def apply(module: Any) -> None:
            patches.replace(module.HrmTextModel, "__init__", _hook_init(self))
            patches.replace(module.HrmTextModel, "forward", _hook_forward(self))
            patches.replace(module.HrmTextStack, "forward", _hook_part)
            patches.replace(module.HrmTextRotaryEmbedding, "forward", _hook_part)
            patches.add(module.HrmTextPreTrainedModel, "set_grad", _set_grad)
            # A checkpoint may have or lack the saved step; Transformers must not warn of that.
            for ignored in ("unexpected", "missing"):
                name = f"_keys_to_ignore_on_load_{ignored}"
                patches.add(module.HrmTextPreTrainedModel, name, ["grad_memory"])

        patches.when_imported(_MODULE, apply)

    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module is an `HrmTextModel`."""
        loaded = sys.modules.get(_MODULE)
        return loaded is not None and isinstance(module, loaded.HrmTextModel)

    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """See `Host.prepare_grad`. A list has one spec per high-level cycle.

        None stands for the model's own gradient.
        """
        config: Any = module.config
        strategies = _strategies(module, spec)
        given = [*spec] if isinstance(spec, list | tuple) else [] if spec is None else [spec]
        texts = [written(each, config.L_cycles) for each in given]
        nameless = [each for each, text in zip(given, texts, strict=True) if text is None]
        saved: Any = texts[0] if len(set(texts)) == 1 else texts or None
        if nameless:
            saved = getattr(config, "grad", None)  # a function has no text to save

        def switch() -> None:
            if nameless:
                say_unwritten(nameless[0], saved)
            _install(module, spec, strategies, saved)
            config.grad = saved

        return switch


def _set_grad(self: nn.Module, spec: Any) -> None:
    """Switch the gradient of the low-level recurrence, now and in the config.

    Args:
        self: a model of the `hrm_text` family.
        spec: a spec of `dpp.get_strategy`, or a list with one spec per high-level cycle; None for
            the model's own `L_bp_cycles`.

    Raises:
        ValueError: if a spec is invalid, or the list has another length. Then nothing is switched.
    """
    host = HrmText()
    switches = [host.prepare_grad(m, spec) for m in self.modules() if host.is_equilibrium(m)]
    for switch in switches:
        switch()


def _strategies(model: Any, spec: Any) -> tuple[GradStrategy, ...]:
    """Return a strategy for each high-level cycle; an empty tuple for a spec of None."""
    if spec is None:
        return ()
    cycles = model.config.H_cycles
    specs = list(spec) if isinstance(spec, list | tuple) else [spec] * cycles
    if len(specs) != cycles:
        raise ValueError(
            f"grad={spec!r} has {len(specs)} entries; expected one, or H_cycles={cycles}: one spec "
            "per high-level cycle"
        )
    known = {"steps": model.config.L_cycles}
    return tuple(fitting(get_strategy(each, known), "a loop") for each in specs)


def _install(model: Any, spec: Any, strategies: tuple[GradStrategy, ...], of: Any) -> None:
    """Give a model the strategies of `spec`; `of` is the `grad` that its config has then."""
    model.__dict__["_deq_phantom_grad"] = (of, strategies)
    model.__dict__["_deq_phantom_made"] = (spec, _cycles(model))
    if strategies:
        remember_each(model, len(strategies))


def _current(model: Any) -> tuple[GradStrategy, ...]:
    """Return a model's strategies; make new ones if its config has another `grad` or loop now."""
    grad = getattr(model.config, "grad", None)
    strategies: tuple[GradStrategy, ...]
    of, strategies = model.__dict__.get("_deq_phantom_grad", (None, ()))
    # Older pickles lack this entry.
    spec, cycles = model.__dict__.get("_deq_phantom_made", (grad, _cycles(model)))
    if grad != of or cycles != _cycles(model):
        spec = spec if grad == of else grad
        strategies = _strategies(model, spec)
        _install(model, spec, strategies, grad)
    return strategies


def _cycles(model: Any) -> tuple[int, int]:
    """Return the numbers of cycles with which strategies are made."""
    return model.config.H_cycles, model.config.L_cycles


def _own(model: Any) -> tuple[GradStrategy, ...]:
    """Return the strategies that do the same as the model's own `L_bp_cycles`."""
    config, padded = model.config, model.L_bp_cycles_padded
    counts = [padded[i] if i < len(padded) else 1 for i in range(config.H_cycles)]
    return tuple(TBPTT(k=min(k, config.L_cycles)) for k in counts)


# --- hooks ------------------------------------------------------------------------------------


def _hook_init(host: HrmText) -> Callable[[Any], Any]:
    """Return the hook that reads the config's `grad`, and gives the model its memories."""

    def hook(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, config, *args, **kwargs)
            if host.is_enabled:
                if not _current(self):
                    say_misspelt(vars(config), "Transformers")
                remember_each(self, self.config.H_cycles)  # `set_step` needs them

        return __init__

    return hook


def _hook_forward(host: HrmText) -> Callable[[Any], Any]:
    """Return the hook that gives the recurrences of a forward pass to strategies."""

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
                    "would fill the cache twice. Pass no cache (use_cache=False), or call "
                    "model.set_grad(None) for the model's own gradient"
                )
            kwargs["use_cache"] = False
            with _Recurrence(self, strategies or _own(self), observers).active():
                return original(self, *args, **kwargs)

        return forward

    return hook


class _Parts(threading.local):
    """The functions that replace modules' forwards in this thread, by the id of the module."""

    def __init__(self) -> None:
        self.by_module: dict[int, Callable[..., Any]] = {}


_parts = _Parts()


@never_compiled
def _say_own(model: Any) -> None:
    """Warn once that the gradient in evaluation mode is the model's own, not the named one."""
    if Trial.depth() or model.__dict__.get("_said_of_eval") or not _current(model):
        return
    model.__dict__["_said_of_eval"] = True
    warn(
        f"{type(model).__name__} in evaluation mode has its own gradient, that of L_bp_cycles, and "
        f"not grad={model.config.grad!r}. To train, call model.train(). For the named gradient in "
        "evaluation mode, call dpp.set_grad(model, spec, in_eval=True). If you want no gradient, "
        "evaluate under torch.no_grad(). This is said once per model.",
        AssumptionWarning,
    )


def _hook_part(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let a module's forward be replaced during an active `_Recurrence` of its model."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        part = _parts.by_module.get(id(self))
        if part is None:
            return original(self, *args, **kwargs)
        return part(functools.partial(original, self), *args, **kwargs)

    return forward


class _Recurrence:
    """One forward pass of a model, in which strategies do the low-level recurrences.

    The model's own code runs its loops as ever, and this object replaces the forwards of its parts.
    The low-level part does nothing until the last call of a high-level cycle. There it does the
    whole loop. The model does not use what the earlier calls return.

    Args:
        model: the `HrmTextModel`.
        strategies: one per high-level cycle.
        observers: the callbacks that get each solve.
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
        """Replace the forwards of the model's parts inside a `with` block."""
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
        """Note the embeddings: the high-level state begins with them."""
        self.high = x
        return original(x, *args, **kwargs)

    def high_level(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note the new high-level state, and begin the next cycle."""
        self.high = original(*args, **kwargs)
        self.cycle, self.calls = self.cycle + 1, 0
        return self.high

    def low_level(self, original: Callable[..., Any], _: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Do nothing until the last call of a cycle; there do the whole loop, with its gradient."""
        model, high = self.model, self.high
        assert high is not None
        if self.low is None:  # the model's own first state
            first = model.z_L_init.to(dtype=high.dtype, device=high.device)
            self.low = first.expand_as(high).contiguous()
        self.calls += 1
        cycles = model.config.L_cycles
        if self.calls < cycles:
            return self.low

        def func(z: Tensor) -> Tensor:
            return original(z.to(high.device) + high, *args, **kwargs)  # type: ignore[no-any-return]

        collecting = OfLoop(func, cycles)
        memories = getattr(model, "grad_memory", None)
        memory = None if memories is None else memories[self.cycle]
        context = Context(initial_state=self.low, memory=memory)
        strategy = self.strategies[self.cycle].resolve(context)
        self.low = loop_observed(
            self.observers, collecting, self.low, cycles, strategy, context, self.cycle
        )
        collecting.end()
        return self.low
