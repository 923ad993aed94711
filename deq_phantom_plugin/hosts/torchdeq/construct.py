"""The construction of TorchDEQ's cores: checks a `grad` with names, and makes its entries.

A core hands out one or several states. Each has an entry of `produce_grad`, which attaches the
gradient of that state (`entries.py`). The command-line option `--grad` takes names as well.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ...contract.strategy import GradStrategy
from ...strategies.arguments import boolean
from ...strategies.registry import get_strategy
from ..settings import defaults, fitting, remember_each, say_misspelt
from .core import n_equilibria
from .entries import ProduceGrad, ProduceSteps
from .solvers import checked_dtype, lacks_inverse_jacobian, registered

# Maps TorchDEQ's names of solvers to ours.
_SOLVERS = {
    "anderson_fast": "anderson",
    "broyden_fast": "broyden",
    "fixed_point_fast": "fixed_point",
    "fixed_point_iter": "fixed_point",
    "simple_fixed_point_iter": "fixed_point",
}
# Maps TorchDEQ's settings to our argument, and the setting's default; see `defaults`.
_SETTINGS: Mapping[str, tuple[str, Any]] = {
    "tau": ("lam", 1.0),
    "b_solver": ("solver", "fixed_point_iter"),
    "b_max_iter": ("max_iter", 40),
    "b_tol": ("tol", 1e-6),
}


def hook_init(original: Callable[..., None]) -> Callable[..., None]:
    """Let the constructor of a core take names as `grad`, `grad_in_eval` and `solve_dtype`."""
    signature = inspect.signature(original)

    def __init__(self: Any, *given: Any, **named: Any) -> None:
        bound = signature.bind(self, *given, **named)
        bound.apply_defaults()
        settings = {**bound.arguments}
        args, kwargs = settings.pop("args"), settings.pop("kwargs")
        del settings["self"]
        effective = {**settings, **_config(args), **kwargs}
        self.__dict__["grad_in_eval"] = boolean(
            "grad_in_eval", effective.get("grad_in_eval", False)
        )
        self.__dict__["solve_dtype"] = checked_dtype(
            effective.get("solve_dtype"), effective.get("f_solver", "fixed_point_iter")
        )
        if not _is_named(effective["grad"]):
            say_misspelt(effective, "TorchDEQ")
            original(self, args, **settings, **kwargs)
            self.__dict__["_grad_settings"] = settings
            return
        specs = _as_list(effective["grad"])
        if effective["ift"] or effective["hook_ift"]:
            raise ValueError(
                f"grad={effective['grad']!r} beside ift=True or hook_ift=True: both choose the "
                "gradient. Pass grad alone; for implicit differentiation pass grad='ift'"
            )
        solver = registered(effective.get("f_solver", "fixed_point_iter"))
        _check_names(specs, effective, solver)
        from torchdeq.utils.config import DEQConfig

        config = DEQConfig(args)
        config.update(**kwargs)  # TorchDEQ changes the caller's own dict here, and so does this
        original(self, DEQConfig({**config.config, "grad": 1}), **settings)
        self.args = config
        self.__dict__["_grad_settings"] = settings
        strategies = strategies_of(specs, effective, n_equilibria(self), solver)
        install(self, strategies, effective)

    return __init__


def _config(args: Any) -> Mapping[str, Any]:
    """Return the settings in TorchDEQ's `args`: None, a dict, a namespace or a DEQConfig."""
    from torchdeq.utils.config import DEQConfig

    if isinstance(args, DEQConfig):
        return args.config  # type: ignore[no-any-return]
    if args is None:
        return {}
    return args if isinstance(args, Mapping) else vars(args)


def _is_steps(grad: Any) -> bool:
    """Whether an entry is a number of steps of TorchDEQ's own phantom gradient."""
    return isinstance(grad, int)


def _as_list(grad: Any) -> list[Any]:
    """Return the entries of a `grad`."""
    return list(grad) if isinstance(grad, list | tuple) else [grad]


def _is_named(grad: Any) -> bool:
    """Whether any entry of a `grad` is a spec, and no number of steps."""
    return any(not _is_steps(spec) for spec in _as_list(grad))


def _check_names(
    specs: list[Any], args: Mapping[str, Any], solver: Any
) -> list[GradStrategy | int]:
    """Return the specs as strategies; integers stay as they are.

    Raises:
        ValueError: if a spec is invalid, or its strategy cannot hand out the states that `sup_gap`
            or `sup_loc` asks for, or needs an estimate that the solver does not make.
    """
    samples = {name: args.get(name) for name in ("sup_gap", "sup_loc")}
    sampling = [
        f"{name}={value!r}"
        for name, value in samples.items()
        if value and (name == "sup_loc" or value > 0)
    ]
    strategies: list[GradStrategy | int] = []
    for spec in specs:
        if _is_steps(spec):
            if spec < 1:
                raise ValueError(
                    f"grad={spec!r}; expected at least 1 step, or a strategy's spec such as 'upg'"
                )
            strategies.append(spec)
            continue
        strategy = get_strategy(spec, defaults(args.get, _SETTINGS, _SOLVERS))
        if lacks_inverse_jacobian(solver):
            fitting(strategy, f"the f_solver {solver.__name__}")
        if sampling and not strategy.hands_out_states:
            raise ValueError(
                f"{sampling[0]} asks for states between the steps of a gradient, and {strategy!r} "
                "does not go in steps. Take upg or bptt, which do, or leave out the setting"
            )
        strategies.append(strategy)
    return strategies


def strategies_of(
    grad: Any, args: Mapping[str, Any], n: int, solver: Any
) -> list[GradStrategy | int]:
    """Return the strategy, or the number of steps, of each of n sampled states.

    Args:
        grad: one entry for all states, or a list of n entries.
        args: TorchDEQ's settings.
        n: the number of states.
        solver: the function that solves.

    Raises:
        ValueError: if `grad` has another number of entries, or one is invalid.
    """
    from torchdeq.grad import make_pair

    specs = _as_list(grad)
    if len(specs) not in (1, n):
        wanted = "1" if n == 1 else f"1 or {n}, one per sampled state"
        raise ValueError(f"grad={grad!r} has {len(specs)} entries; expected {wanted}")
    return list(make_pair(range(n), _check_names(specs, args, solver)))


def install(deq: Any, strategies: list[GradStrategy | int], args: Mapping[str, Any]) -> None:
    """Give each sampled state of an equilibrium its entry; all arguments are checked already."""
    sup_gap, sup_loc = args.get("sup_gap") or -1, tuple(args.get("sup_loc") or ())
    remember_each(deq, len(strategies))
    entries: list[ProduceSteps | ProduceGrad] = [
        ProduceSteps(index, strategy, sup_gap, sup_loc, args.get("tau", 1.0))
        if isinstance(strategy, int)
        else ProduceGrad(index, strategy, sup_gap, sup_loc)
        for index, strategy in enumerate(strategies)
    ]
    own = [entry.function for entry in entries if isinstance(entry, ProduceSteps)]
    # If all entries are integers, TorchDEQ's own functions are used directly.
    deq.produce_grad = own if len(own) == len(entries) else entries


def add_deq_args(parser):  # type: ignore[no-untyped-def]
    """Decorate the commonly used argument parser with arguments used in TorchDEQ.

    Only the code of this function is used, inside TorchDEQ's module. So the function has to import
    what it needs.
    """
    from deq_phantom_plugin.hosts.torchdeq.construct import add_named_grad

    add_named_grad(parser)


def add_named_grad(parser: Any) -> None:
    """Add TorchDEQ's arguments to a parser, with a `--grad` that takes names."""
    from torchdeq.utils import arg_utils

    arg_utils.add_deq_args.deq_phantom_original(parser)
    action = parser._option_string_actions["--grad"]
    action.type = _grad_argument
    action.help = (
        "steps of the phantom gradient, or the spec of a strategy such as upg or "
        "'npg(k=9, lam=0.5)'; one, or one for each sampled state"
    )


def _grad_argument(text: str) -> int | str:
    """Return the value of `--grad`: a number of steps, or a spec that is valid."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        get_strategy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
