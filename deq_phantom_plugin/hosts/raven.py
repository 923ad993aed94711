"""The host of Huginn's Raven, loaded by `trust_remote_code`: `dpp.set_grad(model, "npg")`.

The model's code lies beside its weights (`raven_modeling_minimal.py`). Transformers copies it into
a module whose name is not known before. So the host recognises the class: it is called
`RavenForCausalLM`, and the source of its `iterate_forward` has a known fingerprint. Other versions
are refused. While the host is enabled:

- `config.grad` names the gradient, also in `config.json`. `dpp.set_grad` writes it.
- Without a name, and under `torch.no_grad` as in generation, the model's own code runs.
- With a name the model still draws its n + k evaluations, and the gradient is the named one.
  `adapters/repos/seal_rg_recurrent_pretraining.py` says what one evaluation is, and which one F is.
"""

from __future__ import annotations

import functools
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._plumbing.compilation import never_compiled
from .._plumbing.fingerprint import fingerprint
from ..contract.strategy import Context, GradStrategy
from ..loop import At, evaluations, repeated
from ..strategies import TBPTT
from ..strategies.registry import get_strategy
from .attaching import Attaching
from .evaluation import attaches, watched
from .host import PatchingHost
from .patches import Patches
from .recurrence import Recurrence, refuse_cache
from .settings import fitting, memory_of, say_misspelt
from .solve import Solve, loop_observed
from .written import say_unwritten, written

KNOWN = ("61c9cc5d27821b85",)
"""Fingerprints of the versions of `RavenForCausalLM.iterate_forward` that this host knows."""

_BASE, _NAME, _LOOP = "transformers.modeling_utils", "RavenForCausalLM", "iterate_forward"


class Raven(PatchingHost):
    """The hook into every `RavenForCausalLM` that is loaded."""

    name = "raven"
    package = "transformers"
    known_versions = ("4", "5")  # of Transformers; the model's code is checked by fingerprint
    pip = '"deq-phantom-plugin[text]"'
    in_eval = "told"

    def patch(self, patches: Patches) -> None:
        """Hook the classes that are loaded, and the constructor of models, for later classes."""
        for cls in _loaded():
            self._hook(cls)

        def apply(module: Any) -> None:
            patches.replace(module.PreTrainedModel, "__init__", _hook_init(self))

        patches.when_imported(_BASE, apply)

    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module is a Raven of any version whose files are not patched."""
        return _class_of(module) is not None and not isinstance(
            getattr(module, "loop", None), Attaching
        )

    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """See `Host.prepare_grad`; None stands for the model's own gradient."""
        _check_version(module)
        _strategy(spec, 1)
        config: Any = module.config
        saved = spec if spec is None or isinstance(spec, str) else written(spec, 1)
        nameless = spec is not None and saved is None
        if nameless:
            saved = getattr(config, "grad", None)  # a function has no text to save

        def switch() -> None:
            if nameless:
                say_unwritten(spec, saved)
            if self.is_enabled:
                self._hook(_class_of(module))
            _install(module, spec, saved)
            if saved is None:
                vars(config).pop("grad", None)
            else:
                config.grad = saved

        return switch

    def observe(self, module: nn.Module, callback: Callable[[Solve], None]) -> Callable[[], None]:
        """See `Host.observe`."""
        _check_version(module)
        end = super().observe(module, callback)
        self._hook(_class_of(module))
        return end

    def _hook(self, cls: Any) -> None:
        """Hook a class of a known version, once."""
        with self._lock:
            if _version(cls) in KNOWN and not hasattr(vars(cls)[_LOOP], "_deq_phantom_host"):
                self._patches.replace(cls, _LOOP, _hook_loop(self))
                for ignored in ("unexpected", "missing"):
                    # A checkpoint may have or lack the saved step; no warning of that.
                    name = f"_keys_to_ignore_on_load_{ignored}"
                    if name not in vars(cls):
                        self._patches.add(cls, name, ["grad_memory"])


def _loaded() -> Iterator[type]:
    """Return the Raven classes that are loaded already, each once."""
    modules = [m for m in list(sys.modules.values()) if isinstance(m, types.ModuleType)]
    # Read each `__dict__` directly: `getattr` would make lazy modules import what they offer.
    names = (object.__getattribute__(module, "__dict__").get(_NAME) for module in modules)
    found = {id(cls): cls for cls in names if isinstance(cls, type)}
    return (cls for cls in found.values() if _LOOP in vars(cls))


def _class_of(module: Any) -> type | None:
    """Return the Raven class of a model, of any version; None for any other module."""
    return next((c for c in type(module).__mro__ if c.__name__ == _NAME and _LOOP in vars(c)), None)


@functools.cache
def _version(cls: type) -> str | None:
    """Return the fingerprint of a class's loop, None if its source cannot be read."""
    try:
        source = inspect.getsource(inspect.unwrap(vars(cls)[_LOOP]))
    except (OSError, TypeError):
        return None
    return fingerprint(textwrap.dedent(source).encode(), _LOOP)


def _check_version(module: nn.Module) -> None:
    """Refuse a version of the model's code that this host does not know.

    Raises:
        ValueError: if the version is unknown. The message names it, and the known versions.
    """
    cls = _class_of(module)
    assert cls is not None
    version = _version(cls)
    if version not in KNOWN:
        raise ValueError(
            f"{cls.__module__}.{_NAME}.{_LOOP} is {version or 'without source'}, an unknown "
            f"version; known are {', '.join(KNOWN)}, those of seal-rg/recurrent-pretraining and of "
            "its models. A hook on unknown code could compute a wrong gradient, so nothing was "
            "switched. Load a known revision of the model's code"
        )


def _strategy(spec: Any, steps: int) -> GradStrategy | None:
    """Return the strategy of a spec, None for None."""
    return None if spec is None else fitting(get_strategy(spec, {"steps": steps}), "a loop")


def _install(model: Any, spec: Any, of: Any) -> None:
    """Give a model its spec; `of` is the `grad` of the config that it came from."""
    model.__dict__["_deq_phantom_grad"] = (of, spec)
    if spec is not None:
        memory_of(model)


def _current(model: Any) -> Any:
    """Return a model's spec; take the `grad` of its config if that has changed."""
    grad = getattr(model.config, "grad", None)
    of, spec = model.__dict__.get("_deq_phantom_grad", (None, None))
    if grad != of:
        _strategy(grad, 1)
        spec = grad
        _install(model, spec, grad)
    return spec


# --- hooks ------------------------------------------------------------------------------------


def _hook_init(host: Raven) -> Callable[[Any], Any]:
    """Return the hook on the constructor of all models, which hooks the class of each Raven."""

    def hook(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if (cls := _class_of(self)) is None or not host.is_enabled:
                return
            if getattr(self.config, "grad", None) is not None:
                _check_version(self)
                _current(self)  # makes the memory, which `set_step` needs
            else:
                say_misspelt(vars(self.config), "Transformers")
            host._hook(cls)

        return __init__

    return hook


def _hook_loop(host: Raven) -> Callable[[Any], Any]:
    """Return the hook that gives the loop of a model with a `grad` to its strategy."""

    def hook(original: Callable[..., Any]) -> Callable[..., Any]:
        def iterate_forward(
            self: Any,
            input_embeds: Tensor,
            input_states: Tensor | None,
            freqs_cis: Tensor,
            block_idx: Tensor,
            mask: Any,
            past_key_values: Any = None,
            num_steps: Any = None,
            init_scale: float = 1.0,
        ) -> Any:
            spec = _current(self) if host.is_enabled else None
            observers = host.observers(self) if self.training else []
            if not torch.is_grad_enabled() or (spec is None and not observers):
                given = (freqs_cis, block_idx, mask, past_key_values, num_steps, init_scale)
                return original(self, input_embeds, input_states, *given)
            if input_states is None:
                start = self.initialize_state(input_embeds, scale=init_scale)
            else:
                start = input_states.clone()
            pair = _pair(self, num_steps)
            free, graph = (max(int(number), 0) for number in pair)
            layers = len(self.transformer.core_block)

            def evaluate(i: int, x: Tensor) -> Tensor:
                step = i if i < free else pair[0] + (i - free)
                given = (input_embeds, freqs_cis, mask, past_key_values, block_idx + i * layers)
                # The model's own code checkpoints evaluations with a graph only.
                block = "_maybe_checkpoint_core_block"
                block = block if torch.is_grad_enabled() else "core_block_forward"
                image: Tensor = getattr(self, block)(x, *given, step)[0]
                return image

            refuse_cache(past_key_values, bool(observers) or attaches(self))
            x, before = _looped(self, spec, observers, evaluate, start, free, graph)
            return self.transformer.ln_f(x), *pair, before, block_idx + (free + graph) * layers

        iterate_forward._deq_phantom_host = host.name  # type: ignore[attr-defined]
        # As in the original: the loop itself is not compiled, what it calls may be.
        return torch.compiler.disable(iterate_forward, recursive=False)  # type: ignore[no-any-return]

    return hook


def _pair(model: Any, num_steps: Any) -> tuple[Any, Any]:
    """Return the numbers of evaluations without and with a graph: given, or drawn by the model."""
    if num_steps is None:
        drawn: tuple[Any, Any] = model.randomized_iteration_sampler()
        return drawn
    if hasattr(num_steps, "__len__") and len(num_steps) > 1:
        free, graph = num_steps
        return free, graph
    return num_steps, torch.tensor(0)


@never_compiled  # each number of evaluations would be compiled once more
def _looped(
    model: Any,
    spec: Any,
    observers: list[Callable[[Solve], None]],
    evaluate: At,
    start: Tensor,
    free: int,
    graph: int,
) -> tuple[Tensor, Tensor]:
    """Return the state at the end of a model's loop, attached, and the state before that.

    Args:
        model: the Raven.
        spec: its spec, None for its own gradient.
        observers: the callbacks that get the solve.
        evaluate: makes evaluation number i: (i, state) -> state.
        start: the state where the loop begins.
        free: the number of evaluations without a graph, in the model's own gradient.
        graph: the number of evaluations with a graph, after those.
    """
    steps = free + graph
    if steps == 0:
        return start, start.detach()
    recurrence = Recurrence(evaluate, steps)
    strategy: GradStrategy | None = None
    if spec is None and graph:
        strategy = TBPTT(graph)
    elif spec is not None and attaches(model):
        strategy = get_strategy(spec, {"steps": steps})
    if strategy is None:
        step = evaluations(recurrence.func, watched(model, recurrence.at))
        with torch.no_grad():
            end = repeated(step, start, steps)
    else:
        context = Context(initial_state=start, memory=getattr(model, "grad_memory", None))
        strategy = strategy.resolve(context)
        end = loop_observed(
            observers, recurrence.func, start, steps, strategy, context, at=recurrence.at
        )
    return end, recurrence.before  # type: ignore[return-value]
