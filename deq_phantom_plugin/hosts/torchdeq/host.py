"""TorchDEQ: `get_deq(grad="upg")`, `DEQSliced(grad=...)`, `DEQIndexing(grad=...)`, `--grad upg`.

TorchDEQ's classes are changed in place, and so is the code of `add_deq_args`: scripts hold
references to them from before we are enabled. An equilibrium whose `grad` holds only integers runs
TorchDEQ's own code.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..._plumbing.compilation import never_compiled
from ..._plumbing.once import warn_once
from ...attach import attach, attach_states
from ...contract.errors import AssumptionWarning
from ...contract.memory import Memory
from ...contract.state import State
from ...contract.strategy import BackwardStats, BatchDim, Context, GradStrategy
from ...strategies.registry import get_strategy
from ..evaluation import attaches, check_flag, watched
from ..host import Counted, PatchingHost, Solve, tell, with_counted
from ..patches import Patches
from . import solvers as torchdeq_solvers
from .form import Form, evaluate, like_start

# TorchDEQ's setting -> our argument, the value at which the setting says nothing (TorchDEQ's own
# default, which argparse always sets), and how to translate any other.
_SOLVERS = {
    "anderson_fast": "anderson",
    "broyden_fast": "broyden",
    "fixed_point_fast": "fixed_point",
    "fixed_point_iter": "fixed_point",
    "simple_fixed_point_iter": "fixed_point",
}
_SETTINGS: Mapping[str, tuple[str, Any]] = {
    "tau": ("lam", 1.0),
    "b_solver": ("solver", "fixed_point_iter"),
    "b_max_iter": ("max_iter", 40),
    "b_tol": ("tol", 1e-6),
}


class TorchDEQ(PatchingHost):
    """The hook into TorchDEQ 0.1."""

    name = "torchdeq"
    package = "torchdeq"
    known_versions = ("0.1",)
    pip = '"deq-phantom-plugin[torchdeq]"'

    def patch(self, patches: Patches) -> None:
        """Hook TorchDEQ's two cores and its argument parser, and add our solvers to its table."""
        from torchdeq import core
        from torchdeq.utils import arg_utils

        patches.also(torchdeq_solvers.register())
        for cls in (core.DEQSliced, core.DEQIndexing):
            patches.replace(cls, "__init__", _hook_init)
            patches.replace(cls, "forward", _hook_forward)
            patches.replace(cls, "_solve_fixed_point", _hook_solve)
        patches.replace_code(arg_utils.add_deq_args, _add_deq_args)

    def is_equilibrium(self, module: nn.Module) -> bool:
        """Whether a module is a `DEQSliced` or `DEQIndexing`."""
        core = sys.modules.get("torchdeq.core")
        return core is not None and isinstance(module, core.DEQSliced | core.DEQIndexing)

    def prepare_grad(self, module: nn.Module, spec: Any) -> Callable[[], None]:
        """See `Host.prepare_grad`."""
        settings = module.__dict__.get("_grad_settings", {})
        args = {**settings, **module.args.config}  # type: ignore[union-attr, dict-item]
        strategies = _strategies(spec, args, _n_equilibria(module))

        def switch() -> None:
            _install(module, strategies, args)

        return switch

    def prepare_in_eval(self, module: nn.Module, in_eval: bool) -> Callable[[], None]:
        """See `Host.prepare_in_eval`; TorchDEQ's own gradients are attached there too."""
        return functools.partial(setattr, module, "grad_in_eval", in_eval)

    def observe(self, module: nn.Module, callback: Callable[[Solve], None]) -> Callable[[], None]:
        """See `Host.observe`."""

        def before(deq: Any, args: Any, kwargs: Any) -> Any:
            return with_counted(args, kwargs)

        def after(deq: Any, args: Any, kwargs: Any, output: Any) -> Any:
            if not (deq.training and torch.is_grad_enabled()):
                return None
            states, info = output
            if not states:  # no entry has as many steps as sup_gap
                return None
            # A tensor of its own: a gradient taken at the state that hook_ift returns would be the
            # one that TorchDEQ's hook has already turned into g.
            last = _map(lambda leaf: leaf.view_as(leaf), states[-1])
            _tell(callback, deq, len(states), args, kwargs, last, info)
            return [*states[:-1], last], info

        handles = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end


# --- construction -----------------------------------------------------------------------------


def _hook_init(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(
        self: Any,
        args: Any = None,
        ift: bool = False,
        hook_ift: bool = False,
        grad: Any = 1,
        tau: float = 1.0,
        sup_gap: int = -1,
        sup_loc: Any = None,
        n_states: int = 1,
        indexing: Any = None,
        **kwargs: Any,
    ) -> None:
        settings = {
            "ift": ift,
            "hook_ift": hook_ift,
            "grad": grad,
            "tau": tau,
            "sup_gap": sup_gap,
            "sup_loc": sup_loc,
            "n_states": n_states,
            "indexing": indexing,
        }
        effective = {**settings, **_config(args), **kwargs}
        self.__dict__["grad_in_eval"] = check_flag(
            "grad_in_eval", effective.get("grad_in_eval", False)
        )
        if not _is_named(effective["grad"]):
            original(self, args, **settings, **kwargs)
            self.__dict__["_grad_settings"] = settings
            return
        specs = _as_list(effective["grad"])
        if effective["ift"] or effective["hook_ift"]:
            raise ValueError(
                f"grad={effective['grad']!r} beside ift=True or hook_ift=True: a name says all; "
                "pass grad='ift' for implicit differentiation"
            )
        _check_names(specs, effective)
        from torchdeq.utils.config import DEQConfig

        config = DEQConfig(args)
        config.update(**kwargs)  # as TorchDEQ does, into the caller's own dict
        original(self, DEQConfig({**config.config, "grad": 1}), **settings)
        self.args = config
        self.__dict__["_grad_settings"] = settings
        _install(self, _strategies(specs, effective, _n_equilibria(self)), effective)

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
    return isinstance(grad, int)


def _as_list(grad: Any) -> list[Any]:
    return list(grad) if isinstance(grad, list | tuple) else [grad]


def _is_named(grad: Any) -> bool:
    """Whether any part of a `grad` is for us."""
    return any(not _is_steps(spec) for spec in _as_list(grad))


def _batch_dim(deq: Any) -> BatchDim:
    """Return what an equilibrium says of its samples, see `Context.batch_dim`."""
    told: BatchDim = getattr(deq, "grad_batch_dim", "auto")
    return told


def _n_equilibria(deq: Any) -> int:
    """Return how many states are sampled, each with a gradient of its own."""
    return len(deq.indexing)


def _solves_at_once(deq: Any) -> bool:
    """Whether one solve hands out all states; else there is a solve for each, and none missing."""
    from torchdeq.core import DEQIndexing

    return isinstance(deq, DEQIndexing)


def _defaults(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of TorchDEQ that differ from its defaults, under our names."""
    found = {}
    for setting, (argument, says_nothing) in _SETTINGS.items():
        value = args.get(setting, says_nothing)
        if value != says_nothing:
            found[argument] = _SOLVERS.get(str(value), value) if setting == "b_solver" else value
    return found


def _check_names(specs: list[Any], args: Mapping[str, Any]) -> list[GradStrategy | int]:
    """Turn specs into strategies, integers left alone.

    Raises:
        ValueError: if one is invalid, or cannot hand out the states that are asked for.
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
                raise ValueError(f"grad={spec!r}; expected steps of at least 1, or a spec")
            strategies.append(spec)
            continue
        strategy = get_strategy(spec, _defaults(args))
        if sampling and not strategy.hands_out_states:
            raise ValueError(
                f"{sampling[0]} samples the states that a strategy passes through, and "
                f"{strategy!r} hands out none; upg and bptt do"
            )
        strategies.append(strategy)
    return strategies


def _strategies(grad: Any, args: Mapping[str, Any], n: int) -> list[GradStrategy | int]:
    from torchdeq.grad import make_pair

    specs = _as_list(grad)
    if len(specs) not in (1, n):
        wanted = "1" if n == 1 else f"1 or {n}, one a state"
        raise ValueError(f"grad={grad!r} has {len(specs)} entries; expected {wanted}")
    return list(make_pair(range(n), _check_names(specs, args)))


def _install(deq: Any, strategies: list[GradStrategy | int], args: Mapping[str, Any]) -> None:
    """Give each sampled state of an equilibrium its strategy; nothing can fail from here on."""
    from torchdeq.grad import backward_factory

    sup_gap, sup_loc = args.get("sup_gap") or -1, args.get("sup_loc") or []
    if not hasattr(deq, "grad_memory"):
        deq.grad_memory = nn.ModuleList(Memory() for _ in strategies)
    tau = args.get("tau", 1.0)
    if all(_is_steps(strategy) for strategy in strategies):
        deq.produce_grad = [
            backward_factory(grad_type=steps, tau=tau, sup_gap=sup_gap, sup_loc=sup_loc)
            for steps in strategies
        ]
        return
    deq.produce_grad = [
        ProduceSteps(index, strategy, sup_gap, tuple(sup_loc), tau)
        if isinstance(strategy, int)
        else ProduceGrad(index, strategy, sup_gap, tuple(sup_loc))
        for index, strategy in enumerate(strategies)
    ]


# --- the forward pass -------------------------------------------------------------------------


@dataclass
class _Call:
    """What one forward pass knows that TorchDEQ does not hand to `produce_grad`.

    Attributes:
        z_init: the initial state, in the user's form.
        solves: how many there were.
        initial_states: where each sampled state's solve began.
        infos: how it ended.
        entries: which entry of `produce_grad` each state has that DEQIndexing hands out.
    """

    z_init: State
    in_eval: bool = False
    solves: int = 0
    initial_states: list[State] = field(default_factory=list)
    infos: list[Any] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)


class _Calls(threading.local):
    """The forward passes that this thread is in."""

    def __init__(self) -> None:
        self.by_deq: dict[int, _Call] = {}


_calls = _Calls()


def _hook_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        in_eval = not self.training and attaches(self)
        if not (self.training or in_eval):
            args, kwargs = _with_func(args, kwargs, functools.partial(watched, self))
        named = self.training and any(isinstance(p, Entry) for p in self.produce_grad)
        if not (named or in_eval) and not torchdeq_solvers.sees_states(self.f_solver):
            return original(self, *args, **kwargs)
        # By thread: several may run one model at once.
        calls, key = _calls.by_deq, id(self)
        func, start = _func_and_start(args, kwargs)
        before, calls[key] = calls.get(key), (call := _Call(start, in_eval))
        try:
            states, info = original(self, *args, **kwargs)
            if in_eval:
                writer = kwargs.get("backward_writer")
                states = [*states[:-1], _attached_in_eval(self, call, func, states[-1], writer)]
            return states, info
        finally:
            del calls[key]
            if before is not None:
                calls[key] = before

    return forward


def _func_and_start(args: Any, kwargs: Any) -> tuple[Callable[..., Any], State]:
    """Return F and the initial state, the first two arguments of a core's `forward`."""
    given = [*args, *(kwargs[name] for name in ("func", "z_init", "z_star") if name in kwargs)]
    if len(given) < 2:
        raise TypeError("expected func and an initial state")
    return given[0], given[1]


def _with_func(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a core's `forward` with another F."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, ({**kwargs, "func": change(kwargs["func"])} if "func" in kwargs else kwargs)


def _attached_in_eval(
    deq: Any, call: _Call, func: Callable[..., Any], found: State, writer: Any
) -> State:
    """Attach the gradient of the last state to what was solved for in evaluation mode."""
    producer = deq.produce_grad[-1]
    named = isinstance(producer, ProduceGrad)
    strategy = producer.strategy if named else HostGrad(producer, deq.no_stat)
    context = Context(
        batch_dim=_batch_dim(deq),
        initial_state=call.z_init if isinstance(call.z_init, Tensor) else list(call.z_init),
        solver_result=call.infos[-1],
        monitor=None if writer is None else functools.partial(_report, writer),
        memory=deq.grad_memory[-1] if named else None,
    )
    state = like_start(_map(Tensor.detach, found), call.z_init)
    return attach(functools.partial(evaluate, func), state, strategy, context)


def _hook_solve(original: Callable[..., Any]) -> Callable[..., Any]:
    def _solve_fixed_point(self: Any, deq_func: Any, z_init: Any, *args: Any, **kwargs: Any) -> Any:
        call = _calls.by_deq.get(id(self))
        if call is None:
            return original(self, deq_func, z_init, *args, **kwargs)
        Form.remember(deq_func, call.z_init)
        if not (self.training or call.in_eval):
            return original(self, deq_func, z_init, *args, **kwargs)
        from torchdeq.solver.stat import SolverStat

        at_once = _solves_at_once(self)
        producers = self.produce_grad if at_once else [self.produce_grad[call.solves]]
        if call.in_eval:
            producers = self.produce_grad[-1:]
        call.solves += 1
        strategies = [p.current(self) if isinstance(p, ProduceGrad) else None for p in producers]
        if torch.is_grad_enabled() and all(s is not None and s.owns_solve for s in strategies):
            known = info = SolverStat()  # TorchDEQ's own "not known": -1 throughout
            solved = (z_init, [z_init] * len(producers), info) if at_once else (z_init, info)
        else:
            wanted = any(s is not None and s.wants_inverse_jacobian for s in strategies)
            if wanted and torchdeq_solvers.keeps_inverse_jacobian(self.f_solver):
                options = kwargs.get("solver_kwargs") or {}
                kwargs["solver_kwargs"] = {**options, "keep_inverse": True}
            if at_once and "indexing" in kwargs:
                kwargs["indexing"] = Asked(kwargs["indexing"])
            solved = original(self, deq_func, z_init, *args, **kwargs)
            known = torchdeq_solvers.take_inverse_jacobian(solved[-1])
            if at_once:
                indexing = kwargs.get("indexing", self.indexing)
                call.entries = _entries(indexing, len(solved[1]), producers)
        if isinstance(deq_func.func, Counted):
            deq_func.func.solver_result = known
        call.initial_states += [z_init] * len(producers)
        call.infos += [known] * len(producers)
        return solved

    return _solve_fixed_point


class Asked(list[int]):
    """The steps of DEQIndexing; knows at which of them a solver handed out a state.

    Solvers ask `step in indexing` and then keep the state, but not its step.

    Attributes:
        found: those steps, in the order in which they were reached.
    """

    def __init__(self, steps: Iterable[int]) -> None:
        super().__init__(steps)
        self.found: list[int] = []

    def __contains__(self, step: object) -> bool:
        """Whether a state is sampled at a step."""
        sampled = super().__contains__(step)
        if sampled:
            self.found.append(step)  # type: ignore[arg-type]
        return sampled


def _entries(indexing: Sequence[int], n_states: int, producers: Sequence[Any]) -> list[int]:
    """Return which entry each state has that a solve of DEQIndexing hands out.

    TorchDEQ pairs the first with the first: where a solver stops early, leaves out its first steps
    or has a step twice in its list, states get the entries of others.

    Args:
        indexing: the step of each entry, the limit of the solve for the last.
        n_states: how many states the solve handed out.
        producers: TorchDEQ's `produce_grad`.
    """
    last = len(producers) - 1
    steps = indexing.found if isinstance(indexing, Asked) else []
    if len(steps) != n_states:  # a solver of the user's may ask in its own way
        steps = sorted(set(indexing))
    before = list(indexing[:-1])
    if before != sorted(before) and _differ(producers):
        warn_once(
            f"unsorted {before}",
            f"indexing={before} is not in ascending order: each entry of grad goes with the step "
            "beside it, while the states are handed out in the order of their steps",
            AssumptionWarning,
        )
    n_handed_out = min(n_states, len(producers))  # a longer solve than that which grad was made for
    entries = [min(indexing.index(step), last) for step in steps[: n_handed_out - 1]]
    return [*entries, last]


def _differ(producers: Sequence[Any]) -> bool:
    """Whether entries of a `grad` with names differ from one another."""
    alike = [replace(entry, index=0) for entry in producers if isinstance(entry, Entry)]
    return any(entry != alike[0] for entry in alike)


@dataclass(frozen=True)
class Entry(ABC):
    """An entry of TorchDEQ's `produce_grad`, where a `grad` has names in it.

    TorchDEQ calls the first one for the first state, and so on; which entry that state has, the
    forward pass knows.

    Attributes:
        index: which of the sampled states it is for.
    """

    index: int

    def __call__(
        self, deq: Any, deq_func: Any, z: State, writer: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Return the sampled state, or states, attached; in the form that TorchDEQ solves in."""
        call = _calls.by_deq.get(id(deq))
        if call is not None and len(call.infos) <= self.index:  # disabled in the middle of it
            call = None
        entry = self
        if call is not None and call.entries:
            entry = deq.produce_grad[call.entries[self.index]]
        elif call is None and _solves_at_once(deq) and _differ(deq.produce_grad):
            warn_once(
                "entries without a host",
                "the host torchdeq is not enabled: where a solver stops early, DEQIndexing hands "
                "out states with the gradients of others; call dpp.enable()",
                AssumptionWarning,
            )
        states = entry.produce(call, deq, deq_func, z, writer)
        counted = getattr(deq_func, "func", None)
        if states and isinstance(counted, Counted):
            counted.producer = entry
        return states

    @abstractmethod
    def produce(
        self, call: _Call | None, deq: Any, deq_func: Any, z: State, writer: Any
    ) -> list[Any]:
        """Return the states of this entry; `call` is None where the host is not enabled."""


@dataclass(frozen=True)
class ProduceSteps(Entry):
    """An integer among names: TorchDEQ's own phantom gradient.

    Attributes:
        steps: its steps.
        sup_gap: TorchDEQ's setting of that name.
        sup_loc: likewise.
        tau: likewise.
    """

    steps: int
    sup_gap: int
    sup_loc: tuple[int, ...]
    tau: float

    @property
    def function(self) -> Callable[..., list[Any]]:
        """What TorchDEQ makes of the integer."""
        from torchdeq.grad import backward_factory

        function: Callable[..., list[Any]] = backward_factory(
            grad_type=self.steps, tau=self.tau, sup_gap=self.sup_gap, sup_loc=self.sup_loc
        )
        return function

    def produce(
        self, call: _Call | None, deq: Any, deq_func: Any, z: State, writer: Any
    ) -> list[Any]:
        """See `Entry.produce`."""
        return self.function(deq, deq_func, z, writer=writer)


@dataclass(frozen=True)
class ProduceGrad(Entry):
    """A named strategy for one sampled state.

    Attributes:
        strategy: the strategy.
        sup_gap: TorchDEQ's gap between the states that are handed out, below 1 for none.
        sup_loc: TorchDEQ's numbers of the steps whose states are handed out.
    """

    strategy: GradStrategy
    sup_gap: int
    sup_loc: tuple[int, ...]

    def current(self, deq: Any) -> GradStrategy:
        """Return the strategy of the current step."""
        return self.strategy.resolve(Context(memory=deq.grad_memory[self.index]))

    def produce(
        self, call: _Call | None, deq: Any, deq_func: Any, z: State, writer: Any
    ) -> list[Any]:
        """See `Entry.produce`."""
        if call is None and self.current(deq).owns_solve:
            raise RuntimeError(
                f"{self.strategy!r} owns the solve, which TorchDEQ leaves to it only while the "
                "host is enabled: call dpp.enable()"
            )
        form = Form(deq_func)
        context = Context(
            batch_dim=_batch_dim(deq),
            initial_state=None if call is None else form.unpack(call.initial_states[self.index]),
            solver_result=None if call is None else call.infos[self.index],
            monitor=None if writer is None else functools.partial(_report, writer),
            memory=deq.grad_memory[self.index],
        )
        state = form.unpack(z)
        if torch.is_grad_enabled() and (self.sup_gap > 0 or self.sup_loc):
            states = attach_states(form.func, state, self.strategy, context)
            return [form.pack(state) for state in self._sampled(states)]
        return [form.pack(attach(form.func, state, self.strategy, context))]

    def _sampled(self, states: Iterator[State]) -> Iterator[State]:
        """Yield the states that TorchDEQ's own phantom gradient would hand out."""
        state = None
        for step, state in enumerate(states, start=1):
            if self.sup_gap > 0:
                if step % self.sup_gap == 0:
                    yield state
            elif step in self.sup_loc:
                yield state
        if self.sup_gap <= 0:
            yield state


def _map(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Return a tensor, or a list of tensors, changed."""
    return function(state) if isinstance(state, Tensor) else [function(leaf) for leaf in state]


def _report(writer: Callable[[Any], None], stats: BackwardStats) -> None:
    """Tell TorchDEQ's `backward_writer` what it is told of its own backward solves."""
    from torchdeq.solver.stat import SolverStat

    if stats.residual is None or stats.trace is None:
        return
    steps = torch.full_like(stats.residual, stats.n_vjp)
    writer(SolverStat(rel_lowest=stats.residual, rel_trace=stats.trace, nstep=steps))


# --- observation ------------------------------------------------------------------------------


@never_compiled
def _tell(
    callback: Callable[[Solve], None],
    deq: Any,
    n_states: int,
    args: Any,
    kwargs: Any,
    attached: State,
    info: Any,
) -> None:
    counted, start = _func_and_start(args, kwargs)
    assert isinstance(counted, Counted)
    producer = counted.producer or _last_producer(deq.produce_grad, n_states)
    if isinstance(producer, ProduceGrad):
        strategy = producer.strategy
    else:
        function = producer.function if isinstance(producer, ProduceSteps) else producer
        strategy = HostGrad(function, deq.no_stat)
    steps = [m.step for m in deq.modules() if isinstance(m, Memory) and m.step is not None]
    context = Context(
        batch_dim=_batch_dim(deq),
        initial_state=start if isinstance(start, Tensor) else list(start),
        solver_result=counted.solver_result,
        step=steps[0] if steps else None,
    )
    residual = info["rel_lowest"].detach()
    # -1 is TorchDEQ's "not known"; what a strategy found that owns the solve, it never is. Nor is
    # the last of DEQIndexing's states, if the solve ended between two steps that are sampled.
    owned, sampled = strategy.resolve(context).owns_solve, _n_equilibria(deq) > 1
    known = not owned and not (sampled and _solves_at_once(deq)) and bool((residual >= 0).all())
    tell(
        [callback],
        functools.partial(evaluate, counted.func),
        _map(Tensor.detach, attached),
        attached,
        strategy,
        context,
        counted.nfe,
        known_residual=residual if known else None,
    )


def _last_producer(producers: Sequence[Any], n_states: int) -> Any:
    """Return which of TorchDEQ's own producers handed out the last of the states."""
    for producer in producers:
        known = inspect.getclosurevars(producer).nonlocals if inspect.isfunction(producer) else {}
        if "sup_gap" in known:
            n_states -= known["n_grad_step"] // known["sup_gap"]
        elif "sup_loc" in known:
            reached = range(1, known["n_grad_step"] + 1)
            n_states -= 1 + len(set(known["sup_loc"]).intersection(reached))
        else:
            n_states -= 1
        if n_states <= 0:
            break
    return producer


@dataclass(frozen=True, repr=False)
class HostGrad(GradStrategy):
    """TorchDEQ's own gradient, of an integer or of `ift=True`, as a strategy.

    Attributes:
        producer: what TorchDEQ's `backward_factory` made.
        no_stat: TorchDEQ's setting of that name.
    """

    producer: Callable[..., list[Any]]
    no_stat: bool

    def attach(self, func: Callable[[State], State], equilibrium: State, context: Context) -> State:
        """See `GradStrategy.attach`."""
        from torchdeq.utils.layer_utils import deq_decorator

        start = _map(Tensor.detach, equilibrium)  # hook_ift makes its input require grad
        if isinstance(start, Tensor):
            deq_func, z = deq_decorator(func, start, no_stat=self.no_stat)
        else:
            deq_func, z = deq_decorator(
                lambda *leaves: func(list(leaves)), start, no_stat=self.no_stat
            )
        # hook_ift leaves its hook on the first argument, and must not find the model's there.
        return deq_func.vec2list(self.producer(types.SimpleNamespace(hook=None), deq_func, z)[-1])

    def __repr__(self) -> str:
        known = inspect.getclosurevars(self.producer).nonlocals
        if "n_grad_step" not in known:
            return "torchdeq(ift=True)"
        return f"torchdeq(grad={known['n_grad_step']}, tau={known['tau']})"


# --- the command line -------------------------------------------------------------------------


def _add_deq_args(parser):  # type: ignore[no-untyped-def]
    """Decorate the commonly used argument parser with arguments used in TorchDEQ.

    Only this function's code is used, inside TorchDEQ's module: it has to import what it needs.
    """
    from deq_phantom_plugin.hosts.torchdeq.host import add_named_grad

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
    import argparse

    try:
        return int(text)
    except ValueError:
        pass
    try:
        get_strategy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
