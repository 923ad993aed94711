"""The suite of tests that every strategy must pass; a subclass names the strategy."""
# Longer than 400 lines: one contract, which a third party runs as one class.

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from ..attach import attach
from ..checkpoint import load_memory_state_dict, memory_state_dict
from ..contract.errors import ConvergenceWarning
from ..contract.memory import Memory
from ..contract.state import State
from ..contract.strategy import BackwardStats, Context, GradStrategy
from ..forward import broyden
from ..strategies.registry import Spec, get_strategy
from .contraction import NESTINGS, Contraction, make_equilibrium

CAPABILITIES = (
    "owns_solve",
    "wants_inverse_jacobian",
    "needs_inverse_jacobian",
    "accepts_nonfinite",
    "tells_samples_apart",
    "assumes_equilibrium",
    "exchanges",
    "hands_out_states",
)


class StrategySuite:
    """The contract of a strategy, as tests; a subclass names the strategy.

    Attributes:
        spec: the strategy.
        exact: the relative error that the gradient may have on a strong contraction, against
            backpropagation through many steps. None for an approximation: there its gradient only
            needs a positive inner product with the exact one.
        draws: whether the strategy draws random numbers.
    """

    spec: ClassVar[Spec]
    exact: ClassVar[float | None] = None
    draws: ClassVar[bool] = False

    @pytest.fixture(autouse=True)
    def _seeded(self) -> None:
        torch.manual_seed(0)

    @property
    def strategy(self) -> GradStrategy:
        """The strategy that the spec names."""
        return get_strategy(self.spec)

    def attach(
        self, func: Callable[[State], State], state: State, context: Context | None = None
    ) -> Any:
        """Attach by the strategy. If it wants an inverse Jacobian, Broyden's method makes one."""
        context = context or Context(step=0)
        if self.strategy.wants_inverse_jacobian:
            start = tree_map(torch.zeros_like, state)
            dim = None if context.batch_dim is None or _samples(state) is None else 0
            result = broyden(func, start, batch_dim=dim, tol=1e-2, keep_inverse=True)
            context = dataclasses.replace(context, solver_result=result)
        torch.manual_seed(1)  # each call draws the same numbers, in backward too
        return attach(func, state, self.strategy, context)

    def gradient(self, problem: Contraction, context: Context | None = None) -> Tensor:
        """Return the gradient of a linear loss, as one vector."""
        return problem.gradient_of(self.attach(problem.func, problem.state, context))

    def check(self, got: Tensor, want: Tensor) -> None:
        """Assert that a gradient is near enough to the exact one, see `exact`."""
        if self.exact is not None:
            assert (got - want).norm() <= self.exact * want.norm()
        assert got @ want > 0

    # --- values -----------------------------------------------------------------------------------

    def test_value_is_the_equilibrium(self) -> None:
        problem = nested()
        attached = self.attach(problem.func, problem.state)
        for got, want in zip(tree_leaves(attached), problem.leaves, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)

    def test_no_grad_returns_the_equilibrium_and_evaluates_nothing(self) -> None:
        problem = nested()
        with torch.no_grad():
            attached = attach(_fail, problem.state, self.strategy)
        for got, want in zip(tree_leaves(attached), problem.leaves, strict=True):
            assert torch.equal(got, want)
            assert not got.requires_grad

    def test_structure_shape_dtype_and_memory_format_are_kept(self) -> None:
        conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        torch.nn.init.normal_(conv.weight, std=0.05)
        seen: list[bool] = []

        def func(state: Any) -> Any:
            seen.append(state["x"].is_contiguous(memory_format=torch.channels_last))
            return {"x": torch.tanh(conv(state["x"]))}

        state = {"x": torch.randn(2, 3, 6, 5).to(memory_format=torch.channels_last)}
        with torch.no_grad():
            for _ in range(30):
                state = func(state)
        x = self.attach(func, state)["x"]
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert (x.shape, x.dtype) == ((2, 3, 6, 5), torch.float32)
        x.sum().backward()  # dL/dx is a single number that is expanded, so it has another layout
        assert all(seen)

    def test_states_along_the_way_end_where_attach_does(self) -> None:
        problem = make_equilibrium([(2, 3)], norm=0.5)
        context = Context(batch_dim=0, step=0)
        acting = self.strategy.resolve(context)
        if acting.hands_out_states:
            *_, last = acting.states(problem.func, problem.state, context)
            assert torch.equal(last, self.attach(problem.func, problem.state, context))
        else:
            with pytest.raises(NotImplementedError):
                next(acting.states(problem.func, problem.state, context))

    # --- gradients --------------------------------------------------------------------------------

    @pytest.mark.parametrize("nesting", NESTINGS, ids=lambda nesting: nesting[0])
    def test_the_gradient(self, nesting: tuple[str, int, Callable[..., Any]]) -> None:
        _, n, nest = nesting
        problem = make_equilibrium([(3, 4), (3, 2), (3, 1, 2)][:n], nest, norm=0.3)
        self.check(self.gradient(problem), unrolled(problem))

    def test_the_gradient_of_samples_that_depend_on_one_another(self) -> None:
        problem = make_equilibrium([(4, 3)], coupled=True, norm=0.3)
        self.check(self.gradient(problem, Context(batch_dim=None, step=0)), unrolled(problem))

    def test_the_gradient_of_a_sample_does_not_depend_on_the_others(self) -> None:
        problem = make_equilibrium([(3, 4)], norm=0.5)
        weight, inject = problem.params

        def gradient(rows: slice) -> Tensor:
            z, v = inject[rows], torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4)[rows]
            out = self.attach(lambda h: torch.tanh(h @ weight.mT + z), problem.state[rows])
            return torch.autograd.grad(out, inject, v)[0][rows]

        alone = torch.cat([gradient(slice(i, i + 1)) for i in range(3)])
        tolerance = 10 * (self.exact or 1e-9)
        torch.testing.assert_close(gradient(slice(None)), alone, rtol=tolerance, atol=tolerance)

    def test_the_gradient_reaches_what_the_parameters_of_f_are_computed_from(self) -> None:
        problem = make_equilibrium([(2, 3)], norm=0.5)
        weight, inject = problem.params
        scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
        encoded = scale * (inject / scale).detach()  # has the value of `inject`
        seen: list[Tensor] = []

        def func(h: Any) -> Any:
            seen.append(h)
            return torch.tanh(h @ weight.mT + encoded)

        problem.linear_loss(self.attach(func, problem.state)).backward()
        size, rows = weight.numel(), inject.detach()
        want = self.gradient(problem)
        assert weight.grad is not None
        assert scale.grad is not None
        assert all(h.grad is None for h in [problem.state, *seen] if h.is_leaf)
        torch.testing.assert_close(weight.grad.flatten(), want[:size])
        by_scale = (want[size:].view(2, 3) * rows / scale.detach()).sum(0)
        torch.testing.assert_close(scale.grad, by_scale)

    def test_backward_twice_over_a_retained_graph(self) -> None:
        problem = make_equilibrium([(2, 3)], norm=0.5)
        loss = problem.probe(self.attach(problem.func, problem.state))
        grads = []
        for retain in (True, False):
            torch.manual_seed(1)
            grads.append(torch.autograd.grad(loss, problem.params, retain_graph=retain))
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, problem.params)

    def test_f_that_ignores_some_leaves_or_is_constant(self) -> None:
        weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        state = [torch.tensor([[2.0]]).double(), torch.tensor([[5.0]]).double()]

        def func(s: Any) -> Any:
            return [weight * torch.ones_like(s[0]), torch.full_like(s[1], 5.0)]

        out = self.attach(func, state)
        (grad,) = torch.autograd.grad(out[0].sum() + out[1].sum(), weight)
        self.check(grad.view(1), torch.ones(1, dtype=torch.float64))

    def test_f_without_parameters(self) -> None:
        state = torch.zeros(2, 2, dtype=torch.float64)
        shift = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
        self.attach(lambda h: 0.5 * h + shift, state).sum().backward()
        assert shift.grad is not None
        # Nothing requires a gradient here, and that is no error.
        self.attach(lambda h: 0.5 * h, state)
        self.attach(lambda h: h, state)

    @pytest.mark.parametrize("shape", [(), (0, 3), (1, 3), (3, 1)], ids=str)
    def test_scalar_empty_and_small_states(self, shape: tuple[int, ...]) -> None:
        shift = torch.tensor(0.3, requires_grad=True)
        out = self.attach(lambda h: 0.5 * h + shift, torch.full(shape, 0.6))
        out.sum().backward()
        assert out.shape == shape
        assert shift.grad is not None

    @pytest.mark.parametrize("bad", [float("inf"), float("nan")])
    def test_non_finite_incoming_gradients_pass_through(self, bad: float) -> None:
        """GradScaler finds overflows by them. Gradients of the other samples stay as they were."""
        problem = make_equilibrium([(3, 4)], norm=0.5)
        v = torch.ones(3, 4, dtype=torch.float64)

        def gradient(v: Tensor) -> Tensor:
            attached = self.attach(problem.func, problem.state)
            return torch.autograd.grad(attached, problem.params[1], v)[0]

        clean = gradient(v)
        v[1, 2] = bad
        grad = gradient(v)
        assert not grad[1].isfinite().all()
        tolerance = 10 * (self.exact or 1e-9)
        torch.testing.assert_close(grad[[0, 2]], clean[[0, 2]], rtol=tolerance, atol=tolerance)

    # --- precision --------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        shapes: list[tuple[int, ...]] = [(2, 4), (2, 3)]
        want = self.gradient(make_equilibrium(shapes, list, norm=0.5))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 16 bits may miss the tolerance
            got = self.gradient(make_equilibrium(shapes, list, norm=0.5, dtype=dtype))
        assert got.dtype == dtype
        assert torch.nn.functional.cosine_similarity(got.double(), want, dim=0) > 0.999

    def test_inside_autocast(self) -> None:
        linear = torch.nn.Linear(4, 4)
        torch.nn.init.normal_(linear.weight, std=0.1)
        state, func = torch.zeros(2, 4), lambda h: torch.tanh(linear(h)).to(h.dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            with torch.no_grad():
                for _ in range(30):
                    state = func(state)
            out = self.attach(lambda h: torch.tanh(linear(h)), state)
            assert out.dtype == torch.float32
            out.sum().backward()
        assert linear.weight.grad is not None
        assert linear.weight.grad.isfinite().all()

    def test_backward_inside_autocast(self) -> None:
        problem = make_equilibrium([(3, 12)], norm=0.5, dtype=torch.float32)
        plain = self.gradient(problem)
        loss = problem.linear_loss(self.attach(problem.func, problem.state))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grads = torch.autograd.grad(loss, problem.params)
        got = torch.cat([grad.flatten() for grad in grads])
        assert (got - plain).norm() < 2e-2 * plain.norm()  # F's own last pass is in 16 bits

    # --- surroundings -----------------------------------------------------------------------------

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_inside_activation_checkpointing(self, reentrant: bool) -> None:
        problem = make_equilibrium([(2, 3)], norm=0.5)
        evaluations: list[int] = []

        def func(h: Any) -> Any:
            evaluations.append(1)
            return problem.func(h)

        def region(gate: Tensor) -> Any:
            return self.attach(func, problem.state) * gate.sum()

        gate = torch.ones(2, dtype=torch.float64, requires_grad=True)
        tensors = [*problem.params, gate]
        plain = torch.autograd.grad(problem.linear_loss(region(gate)), tensors)
        once = len(evaluations)
        evaluations.clear()
        problem.linear_loss(checkpoint(region, gate, use_reentrant=reentrant)).backward()
        for tensor, want in zip(tensors, plain, strict=True):
            torch.testing.assert_close(tensor.grad, want, rtol=1e-9, atol=1e-12)
        # One forward and one recomputation, whatever the number of products.
        assert len(evaluations) <= 2 * once

    def test_an_equilibrium_from_inference_mode(self) -> None:
        problem = make_equilibrium([(2, 3)], norm=0.5)
        with torch.inference_mode():
            problem.state = problem.func(problem.state)
        assert self.gradient(problem).isfinite().all()

    def test_random_numbers(self) -> None:
        problem = make_equilibrium([(2, 3)], norm=0.5)
        attached = self.attach(problem.func, problem.state)
        problem.linear_loss(attached).backward()
        drawn = torch.get_rng_state()
        torch.manual_seed(1)
        assert self.draws != torch.equal(drawn, torch.get_rng_state())

    def test_with_a_memory_that_is_saved(self) -> None:
        problem, memory = make_equilibrium([(2, 3)], norm=0.3), Memory()
        for step in range(3):
            memory.tell(step, None, 0)
            self.check(self.gradient(problem, Context(memory=memory)), unrolled(problem))
            resumed = Memory()
            load_memory_state_dict(resumed, _through_a_file(memory_state_dict(memory)))
            resumed.load_state_dict(_through_a_file(memory.state_dict()))
            assert resumed.step == step
            memory = resumed

    def test_a_monitor_is_told_of_each_sample(self) -> None:
        problem = make_equilibrium([(3, 4)], norm=0.5)
        told: list[Any] = []
        self.gradient(problem, Context(batch_dim=0, monitor=told.append, step=0))
        for stats in told:
            assert isinstance(stats, BackwardStats)
            assert isinstance(stats.n_vjp, int)
            assert stats.residual is None or stats.residual.shape == (3,)
            assert stats.trace is None or stats.trace.shape[0] == 3

    def test_nothing_leaks(self) -> None:
        """The garbage collector for cycles is off, so that only reference counts free memory."""
        gc.collect()
        gc.disable()
        try:
            for ending in ("never", "once", "twice", "raises"):
                assert self._left_alive(ending) == [], ending
        finally:
            gc.enable()

    def _left_alive(self, ending: str) -> list[Tensor]:
        """Return those tensors of F's graph, and of the result, that outlive the result.

        Args:
            ending: how often backward runs: "never", "once", "twice"; or "raises", where it fails.
        """
        problem = make_equilibrium([(2, 3)], norm=0.5)
        # PyTorch's checkpoint keeps the first state that it sees in a process; not ours, then.
        checkpoint(torch.tanh, torch.ones(1, requires_grad=True), use_reentrant=False).backward()
        refs: list[weakref.ref[Tensor]] = []

        def func(h: Any) -> Any:
            middle = h * 1.0
            out = problem.func(middle)
            refs.extend([weakref.ref(middle), weakref.ref(out)])
            return out

        attached = self.attach(func, problem.state)
        refs.append(weakref.ref(attached))
        if ending in ("once", "twice"):
            attached.sum().backward(retain_graph=ending == "twice")
        if ending == "twice":
            attached.sum().backward()
        if ending == "raises":
            problem.params[1].register_hook(_fail)
            with pytest.raises(ZeroDivisionError):
                attached.sum().backward()
        del attached
        return [tensor for ref in refs if (tensor := ref()) is not None]

    # --- declarative ------------------------------------------------------------------------------

    def test_it_says_what_it_is_capable_of(self) -> None:
        strategy = self.strategy
        for name in CAPABILITIES:
            assert isinstance(getattr(strategy, name), bool), name
        acting = strategy.resolve(Context(batch_dim=0, step=0))
        assert isinstance(acting, GradStrategy)
        assert isinstance(acting.steps_ahead, int)
        assert acting.steps_ahead >= 0

    def test_it_is_a_value(self) -> None:
        strategy = self.strategy
        if not strategy.name:
            pytest.skip("the strategy is not registered, so no spec parses to it")
        assert strategy == get_strategy(repr(strategy))
        assert hash(strategy) == hash(copy.deepcopy(strategy))
        for loaded in (pickle.loads(pickle.dumps(strategy)), _through_a_file(strategy)):
            assert loaded == strategy
            assert repr(loaded) == repr(strategy)
        with pytest.raises(AttributeError):
            strategy.k = 3  # type: ignore[attr-defined]


def nested() -> Contraction:
    """Return an equilibrium of three tensors in a dict, a tuple and a list."""
    return make_equilibrium([(2, 3), (2, 2), (2, 2, 1)], NESTINGS[-1][2], norm=0.5)


def unrolled(problem: Contraction, steps: int = 60) -> Tensor:
    """Return the gradient by backpropagation through many steps."""
    state = problem.state
    for _ in range(steps):
        state = problem.func(state)
    return problem.gradient_of(state)


def _fail(_: Any) -> Any:
    raise ZeroDivisionError


def _samples(state: Any) -> int | None:
    """Return the number of samples along dimension 0; None where the leaves do not agree on it."""
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in tree_flatten(state)[0]}
    return sizes.pop() if len(sizes) == 1 else None


def _through_a_file(value: Any) -> Any:
    """Return a value after `torch.save` and `torch.load` with `weights_only=True`."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
