"""What forward solvers do around F: operators and reads, counted; looks at convergence."""

from __future__ import annotations

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.late_read import LateRead
from deq_phantom_plugin.forward import anderson, broyden, fixed_point
from deq_phantom_plugin.testing import make_equilibrium

SOLVERS = [anderson, broyden, fixed_point]
# Beyond F. They hold on any machine; a view is no operator, and neither is memory that is taken.
MOST = {"fixed_point": 3, "anderson": 8, "broyden": 11}
VIEWS = {
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "new_empty",
    "permute",
    "select",
    "slice",
    "squeeze",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}


class Operators(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def operators(run):
    with Operators() as counted:
        run()
    return sum(n for name, n in counted.counts.items() if name not in VIEWS)


@pytest.mark.parametrize("solver", SOLVERS)
def test_operators_of_an_iteration(solver):
    """The difference of two lengths, which leaves out what a solve takes once."""
    weight = 0.5 * torch.eye(6)

    def count(steps):
        calls = []

        def func(h):
            calls.append(1)
            return h @ weight + 1  # two operators

        start = torch.zeros(3, 6)
        n = operators(lambda: solver(func, start, max_iter=steps, tol=0.0, stop_mode="rel"))
        return n - 2 * len(calls)

    assert count(14) - count(9) <= 5 * MOST[solver.__name__]


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_read_each_check(solver, monkeypatch):
    reads = []
    read = LateRead.read
    monkeypatch.setattr(LateRead, "read", lambda self, n: reads.append(1) or read(self, n))
    problem = make_equilibrium([(3, 20)], norm=0.9)
    start = torch.zeros_like(problem.state)
    for every in (1, 4):
        reads.clear()
        found = solver(problem.func, start, max_iter=18, tol=0.0, check_every=every)
        iterations = found.abs_trace.shape[1] - 1
        assert len(reads) == -(-iterations // every)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_looks_that_are_rare_find_the_same(solver, stop_mode, late, monkeypatch):
    monkeypatch.setattr(LateRead, "is_late", staticmethod(lambda device: late))
    problem = make_equilibrium([(5, 20)], norm=0.9)
    start = torch.zeros_like(problem.state)

    def solved(steps, every, **options):
        options |= {"max_iter": steps, "stop_mode": stop_mode, "check_every": every}
        return solver(problem.func, start, **options)

    for steps in (7, 13):
        often = solved(steps, 1, tol=0.0, sample_at=(4, 6), return_final=True)
        for every in (2, 3, 5, 40):
            rare = solved(steps, every, tol=0.0, sample_at=(4, 6), return_final=True)
            torch.testing.assert_close(rare.state, often.state, rtol=1e-12, atol=1e-12)
            assert len(rare.sampled) == len(often.sampled)
            for a, b in zip(rare.sampled, often.sampled, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            n = often.abs_trace.shape[1]
            first = {"broyden": 2, "anderson": 3, "fixed_point": 1}[solver.__name__]
            looks = [i for i in range(1, n) if i % every == 0 or i == n - 1]
            looks = sorted({*looks, *(e - first + 1 for e in (4, 6) if 1 <= e - first + 1 < n)})
            for trace in ("abs_trace", "rel_trace"):
                got, want = getattr(rare, trace), getattr(often, trace)
                torch.testing.assert_close(got[:, looks], want[:, looks], rtol=1e-9, atol=1e-12)
                last = [max((i for i in looks if i <= j), default=0) for j in range(1, n)]
                held = torch.where(torch.tensor(last) > 0, got[:, last], got[:, 1:])
                assert torch.equal(got[:, 1:], held)
    tight = solved(200, 4, tol=1e-9)
    torch.testing.assert_close(tight.state, problem.state, rtol=1e-7, atol=1e-7)
    assert (tight.abs_lowest if stop_mode == "abs" else tight.rel_lowest).max() < 1e-9


@pytest.mark.parametrize("samples", [3, 40])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_best_state_of_each_sample_is_kept(solver, every, late, samples, monkeypatch):
    """Of a map that leaves its equilibrium: what is returned is the best of all that were seen."""
    monkeypatch.setattr(LateRead, "is_late", staticmethod(lambda device: late))
    gain = torch.linspace(0.2, 3.0, samples, dtype=torch.float64)[:, None]
    seen = []

    def func(h):
        image = torch.sin(gain * h) + 0.5
        seen.append((h.clone(), image.clone()))
        return image

    found = solver(
        func, torch.ones(samples, 4, dtype=torch.float64), max_iter=12, tol=0.0, check_every=every
    )
    # Before Broyden's first iterate there is one evaluation, before Anderson's there are two.
    seen = seen[{"broyden": 1, "anderson": 2, "fixed_point": 0}[solver.__name__] :]
    seen = [pair for i, pair in enumerate(seen, 1) if i % every == 0 or i == len(seen)]
    residual = torch.stack([(image - h).norm(dim=1) for h, image in seen])
    lowest, when = residual.min(dim=0)
    torch.testing.assert_close(found.abs_lowest, lowest, rtol=1e-9, atol=1e-12)
    states = torch.stack([h if solver is broyden else image for h, image in seen])
    best = states[when, torch.arange(samples)]
    torch.testing.assert_close(found.state, best, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_trace_before_the_first_look_is_no_residual(solver, late, monkeypatch):
    """Of a map whose relative residual is above one: what stands in for it must not be lower."""
    monkeypatch.setattr(LateRead, "is_late", staticmethod(lambda device: late))
    calls = []

    def func(h):
        calls.append(1)
        return torch.full_like(h, (-0.25) ** len(calls))

    start = torch.zeros(3, 4, dtype=torch.float64)
    options = {"max_iter": 5, "tol": 0.0, "stop_mode": "rel", "check_every": 3}
    found = solver(func, start, **options)
    assert (found.rel_lowest > 1).all()
    assert (found.rel_trace[:, :3] == 1e8).all()
    torch.testing.assert_close(found.rel_trace[:, 3:].amin(dim=1), found.rel_lowest)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_f_may_keep_the_states_that_it_is_given(solver, late, monkeypatch):
    monkeypatch.setattr(LateRead, "is_late", staticmethod(lambda device: late))
    kept, copies, weight = [], [], 0.6 * torch.eye(4)

    def func(h):
        kept.append(h)
        copies.append(h.clone())
        return torch.tanh(h @ weight) + 0.3

    solver(func, torch.zeros(3, 4), max_iter=15, tol=0.0)
    assert len(kept) > 10
    assert all(map(torch.equal, kept, copies))


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_empty_batch_is_solved(solver):
    calls = []
    found = solver(lambda h: calls.append(1) or torch.cos(h), torch.zeros(0, 3), max_iter=40)
    assert found.state.shape == (0, 3)
    assert found.abs_trace.shape[0] == 0
    assert len(calls) <= 3


def test_torchdeq_takes_it():
    pytest.importorskip("torchdeq")
    from torchdeq import get_deq

    problem, calls = make_equilibrium([(3, 20)], norm=0.5), []
    with dpp.enabled("torchdeq"):
        deq = get_deq(f_solver="fixed_point_fast", f_max_iter=90, f_tol=1e-9).eval()
    for every in (1, 10):
        calls.clear()
        with torch.no_grad():
            (state,), _ = deq(
                lambda h: calls.append(1) or problem.func(h),
                torch.zeros_like(problem.state),
                solver_kwargs={"check_every": every},
            )
        assert len(calls) % every == 0
        torch.testing.assert_close(state, problem.state, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("shape", [(1, 4), (3, 1), (4,), ()])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_smaller_image_is_not_expanded(solver, shape, inference):
    start = torch.zeros(3, 4)
    with torch.inference_mode(inference), pytest.raises((ValueError, RuntimeError), match="shape"):
        solver(lambda h: torch.ones(shape), start)


@pytest.mark.parametrize("every", [0, -1])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_check_that_never_comes_is_refused(solver, every):
    with pytest.raises(ValueError, match=f"check_every={every}; expected at least 1"):
        solver(torch.cos, torch.zeros(2, 3), check_every=every)
