"""Memory of small solves is used again, and never by two solves at once."""

import sys
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode

from deq_phantom_plugin import forward
from deq_phantom_plugin._plumbing.workspaces import _MOST, Workspace, Workspaces
from deq_phantom_plugin.adjoint import inverse_estimate

SOLVERS = {"broyden": forward.broyden, "anderson": forward.anderson}


class Room(Workspace):
    def __init__(self, like, n):
        self.tensor = like.new_empty(n)


@pytest.fixture
def rooms():
    return Workspaces(Room)


def test_what_is_given_back_is_used_again(rooms):
    like = torch.empty(2, 3)
    first, second = rooms.take(like, 4), rooms.take(like, 4)
    assert first is not second
    rooms.give_back(first)
    assert rooms.take(like, 4) is first
    assert rooms.take(like, 4) not in (first, second)


@pytest.mark.parametrize(
    "other",
    [
        lambda: (torch.empty(2, 3), 5),
        lambda: (torch.empty(3, 2), 4),
        lambda: (torch.empty(2, 3, dtype=torch.float64), 4),
        lambda: (torch.empty(2, 3, device="meta"), 4),
        lambda: (torch.nn.Parameter(torch.empty(2, 3)), 4),
    ],
)
def test_by_another_kind_it_is_not(rooms, other):
    room = rooms.take(torch.empty(2, 3), 4)
    rooms.give_back(room)
    assert rooms.take(*other()) is not room


def test_in_inference_mode_there_are_others(rooms):
    like = torch.empty(2, 3)
    with torch.inference_mode():
        room = rooms.take(like, 4)
        rooms.give_back(room)
        assert rooms.take(like, 4) is room
        rooms.give_back(room)
    assert rooms.take(like, 4) is not room
    rooms.take(like, 4).tensor.zero_()


def test_what_modes_and_transforms_make_is_used_once(rooms):
    def used_again(like):
        room = rooms.take(like, 4)
        rooms.give_back(room)
        return rooms.take(like, 4) is room

    assert used_again(torch.empty(2, 3))
    with FakeTensorMode():
        assert not used_again(torch.empty(2, 3))
    seen = []
    torch.func.grad(lambda x: seen.append(used_again(x)) or x.sum())(torch.ones(2, 3))
    assert seen == [False]


def test_what_is_large_is_used_once(rooms):
    like = torch.empty(2**9, 2**10)
    room = rooms.take(like, 1)
    rooms.give_back(room)
    assert rooms.take(like, 1) is not room


@pytest.mark.parametrize("solver", [forward.broyden, forward.anderson])
def test_what_waits_is_small_where_samples_are_many_and_short(solver):
    """Broyden's method keeps a triangular system for each sample, which may be most of it."""
    memories = {
        forward.broyden: inverse_estimate._memories,
        forward.anderson: sys.modules["deq_phantom_plugin.forward.anderson"]._memories,
    }[solver]
    memories._waiting.clear()
    for batch in range(4000, 4004):
        solver(lambda h: 0.5 * h + 1, torch.zeros(batch, 1), max_iter=50)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for waiting in memories._waiting.values()
        for work in waiting
        for tensor in vars(work).values()
        if isinstance(tensor, torch.Tensor)
    }
    assert sum(held.values()) < 4 * 2**20 * _MOST


def test_few_wait(rooms):
    for n in range(1, 5 * _MOST):
        rooms.give_back(rooms.take(torch.empty(2), n))
        assert sum(map(len, rooms._waiting.values())) <= _MOST


def problem(seed, batch=2, width=6):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, width, generator=generator, dtype=torch.float64)
    weight *= 0.5 / torch.linalg.matrix_norm(weight, 2)
    z = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(width, dtype=torch.float64) - weight, z.mT).mT
    return (lambda h: h @ weight.mT + z), torch.zeros_like(z), exact


def solved(solver, func, start):
    return solver(func, start, max_iter=60, tol=1e-10).state


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_solve_inside_another_of_its_shape(solver):
    """The inner one is taken anew in each evaluation of the outer one."""
    inner, start, inner_exact = problem(0)
    outer, _, _ = problem(1)

    def func(h):
        return outer(0.1 * h) + solved(solver, inner, start)

    for _ in range(3):
        found = solved(solver, func, start)
        torch.testing.assert_close(found, outer(0.1 * found) + inner_exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_results_are_not_written_by_later_solves(solver):
    options = {"max_iter": 60, "tol": 1e-10}
    problems = [problem(seed) for seed in range(5)]
    found, sampled = [], []
    for func, start, _ in problems:
        found.append(solver(func, start, sample_at=(4,), **options))
        sampled.append(found[-1].sampled[0].clone())
    kept = [
        forward.broyden(func, start, keep_inverse=True, **options) for func, start, _ in problems
    ]
    for solution, before, (func, start, exact), whole in zip(
        found, sampled, problems, kept, strict=True
    ):
        torch.testing.assert_close(solution.state, exact, rtol=0, atol=1e-8)
        torch.testing.assert_close(solution.sampled[0], before, rtol=0, atol=0)
        ones = torch.ones_like(start)
        want = forward.broyden(func, start, keep_inverse=True, **options)
        torch.testing.assert_close(
            whole.inverse_jacobian.transposed([ones])[0],
            want.inverse_jacobian.transposed([ones])[0],
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_what_f_keeps_is_not_written(solver):
    func, start, _ = problem(0)
    given, copies = [], []

    def keeps(h):
        given.append(h)
        copies.append(h.clone())
        return func(h)

    for _ in range(3):
        solved(solver, keeps, start)
    for state, copy in zip(given, copies, strict=True):
        assert torch.equal(state, copy)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_after_an_error_in_f(solver):
    func, start, exact = problem(0)
    calls = []

    def fails(h):
        calls.append(1)
        if len(calls) % 5 == 0:
            raise RuntimeError("in F")
        return func(h) + torch.nan

    for _ in range(3):
        with pytest.raises(RuntimeError, match="in F"):
            solver(fails, start, max_iter=60, tol=1e-10, return_final=True)
        torch.testing.assert_close(solved(solver, func, start), exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_solves_in_threads(solver):
    errors = []

    def work(seed):
        func, start, exact = problem(seed)
        for _ in range(30):
            errors.append(float((solved(solver, func, start) - exact).abs().max()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 120
    assert max(errors) < 1e-8
